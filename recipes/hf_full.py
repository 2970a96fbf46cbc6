"""Train a pretrained causal LM whole, with temperatures in a group of their own.

    python -m recipes.hf_full                                               # a random model: is everything in place?
    python -m recipes.hf_full --model FOLDER_OR_NAME --text my.txt --folder runs/full --lr 1e-5

Temperatures are never decayed (decay would pull the paper's slope to 0.5) and take larger steps: they start at 0.
"""

import clearhead as ch
from recipes.hf_common import arguments, load, loss_of, train


def main() -> None:
    """See the top of this file."""
    options = arguments(__doc__, learning_rate=1e-5)
    model, blocks, held_out = load(options)
    print(ch.hf.patch(model, "softmax+selective"))
    model.gradient_checkpointing_enable()
    print(f"held-out loss {loss_of(model, held_out):.4f} before")

    own = ch.hf.temperature_parameters(model)
    others = [p for name, p in model.named_parameters() if name not in own]
    groups = [
        {"params": [p for p in others if p.dim() > 1], "lr": options.lr, "weight_decay": 0.01},
        {"params": [p for p in others if p.dim() <= 1], "lr": options.lr, "weight_decay": 0.0},
        {"params": list(own.values()), "lr": options.temperature_lr, "weight_decay": 0.0},
    ]
    train(model, groups, blocks, options)
    print(f"held-out loss {loss_of(model, held_out):.4f} trained")

    model.save_pretrained(options.folder)
    print(f"{loss_of(ch.hf.load(options.folder), held_out):.4f} loaded again from {options.folder}")


if __name__ == "__main__":
    main()
