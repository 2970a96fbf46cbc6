"""LoRA and temperatures, by PEFT: `modules_to_save` trains the temperatures beside the adapters and saves them there.

    python -m recipes.hf_lora_and_temperature                               # a random model: is everything in place?
    python -m recipes.hf_lora_and_temperature --model FOLDER_OR_NAME --text my.txt --folder runs/lora

Patch first, then add adapters; and the same two steps before an adapter is opened again.
"""

import copy

import clearhead as ch
from clearhead.hf.temperatures import NAME
from recipes.hf_common import arguments, load, loss_of, train


def main() -> None:
    """See the top of this file."""
    import peft

    options = arguments(__doc__, learning_rate=3e-4)
    base, blocks, held_out = load(options)
    ch.hf.patch(base, "softmax+selective")
    again = copy.deepcopy(base)  # to open the adapter on; usually from_pretrained and patch
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=[NAME])
    model = peft.get_peft_model(base, config)
    model.print_trainable_parameters()
    print(f"held-out loss {loss_of(model, held_out):.4f} before")

    own = ch.hf.temperature_parameters(model)
    adapters = [p for name, p in model.named_parameters() if p.requires_grad and name not in own]
    groups = [
        {"params": adapters, "lr": options.lr, "weight_decay": 0.0},
        {"params": list(own.values()), "lr": options.temperature_lr, "weight_decay": 0.0},
    ]
    train(model, groups, blocks, options)
    print(f"held-out loss {loss_of(model, held_out):.4f} trained")

    model.save_pretrained(options.folder / "adapter")
    opened = peft.PeftModel.from_pretrained(again, options.folder / "adapter")
    print(f"{loss_of(opened, held_out):.4f} opened again from {options.folder / 'adapter'}")
    merged = model.merge_and_unload()  # one patched model, without PEFT
    merged.save_pretrained(options.folder / "merged")
    print(f"{loss_of(ch.hf.load(options.folder / 'merged'), held_out):.4f} merged into {options.folder / 'merged'}")


if __name__ == "__main__":
    main()
