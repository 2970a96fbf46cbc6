"""`clearhead finetune`: from options to a run, and from a finished run to a Hugging Face folder. Used by `cli.py`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clearhead._run_commands import source_name
from clearhead.errors import UserError

if TYPE_CHECKING:
    from clearhead._options import Finetune
    from clearhead.train.config import RunConfig


def finetune_run(asked: Finetune) -> tuple[RunConfig, Path]:
    """Return the configuration that the options mean, and the run's folder. Imports no torch."""
    from clearhead.compare.arms import read_changes, with_changes
    from clearhead.train.finetune import RATES, finetune_config

    _check_export(asked.export)
    rates = RATES[asked.tune]
    lr = rates.lr if asked.lr is None else asked.lr
    # The temperatures' rate stays where it is when the others' is changed: the config holds their ratio.
    own = rates.lr * rates.temperature_lr_scale if asked.temperature_lr is None else asked.temperature_lr
    if asked.tune == "temperature" and asked.temperature_lr is None:
        own = lr
    config = finetune_config(
        source_name(asked.model),
        attention=asked.attention,
        tune=asked.tune,
        data=source_name(asked.data),
        context=asked.context,
        steps=asked.steps,
        model={
            "temperature_lr_scale": own / lr if lr > 0 else 1.0,
            "gradient_checkpointing": asked.gradient_checkpointing,
            "lora_rank": asked.lora_rank,
            "lora_alpha": 2.0 * asked.lora_rank,
            "lora_targets": asked.lora_targets,
        },
        optim={"lr": lr},
        train={"batch_size": asked.batch, "seed": asked.seed, "precision": asked.precision, "device": asked.device},
    )
    config = with_changes(config, read_changes(asked.set))
    return config, asked.out or default_folder(config)


def default_folder(config: RunConfig) -> Path:
    """Return finetune-MODEL-ATTENTION, in letters that every file system takes."""
    model: Any = config.model
    words = f"finetune-{Path(model.source).name}-{model.attention}"
    return Path(re.sub(r"[^A-Za-z0-9._+=-]+", "-", words))


def export_run(run: Path, target: Path) -> None:
    """Write a finished run's model to a new folder, and say how to open it."""
    if os.environ.get("RANK", "0") != "0":
        return
    from clearhead.hf.export import export_run as export

    export(run, target)
    print(f"the model is in {target}; open it with: clearhead.hf.load({str(target)!r})", file=sys.stderr)


def _check_export(target: Path | None) -> None:
    if target is not None and target.exists():
        raise UserError(f"--export: {target} exists; choose a new folder, nothing there was touched")
