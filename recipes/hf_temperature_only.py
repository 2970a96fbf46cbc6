"""Train nothing but Selective Self-Attention's temperatures on a pretrained causal LM.

    python -m recipes.hf_temperature_only                                   # a random model: is everything in place?
    python -m recipes.hf_temperature_only --model FOLDER_OR_NAME --text my.txt --folder runs/temperatures

The model's own weights stay as they are: at step 0 it answers as it always did, and what is trained is well below half
a percent of it.
"""

import clearhead as ch
from recipes.hf_common import arguments, load, loss_of, train


def main() -> None:
    """See the top of this file."""
    options = arguments(__doc__, learning_rate=1e-2)
    model, blocks, held_out = load(options)
    before = loss_of(model, held_out)
    report = ch.hf.patch(model, "softmax+selective")
    trained = ch.hf.freeze_all_but_temperatures(model)
    print(f"{trained:,} of {report.parameters:,} parameters are trained; held-out loss {before:.4f} before, ", end="")
    print(f"{loss_of(model, held_out):.4f} patched")

    temperatures = {"params": list(ch.hf.temperature_parameters(model).values()), "weight_decay": 0.0}
    train(model, [{**temperatures, "lr": options.temperature_lr}], blocks, options)
    print(f"held-out loss {loss_of(model, held_out):.4f} trained")

    model.save_pretrained(options.folder)
    print(f"{loss_of(ch.hf.load(options.folder), held_out):.4f} loaded again from {options.folder}")


if __name__ == "__main__":
    main()
