"""LoRA (Hu et al., arXiv 2106.09685) by the peft library: small matrices beside a pretrained model's own."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn as nn

from clearhead.errors import UserError
from clearhead.init.standard import parameter_seed
from clearhead.models.pretrained_config import ALL_LINEAR, PEFT_DEFAULT, PretrainedConfig

PART = "lora_"


def add_lora(model: Any, config: PretrainedConfig, seed: int) -> Any:
    """Put LoRA beside the modules that the config names, in place; return peft's model around them.

    The start is peft's (A uniform, B zero), but each matrix is drawn by its own generator from (seed, name): arms of a
    comparison that share a matrix share its start.

    Raises `UserError` when peft is missing, knows no default for this kind of model, or finds none of the names.
    """
    try:
        import peft  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise UserError("tune=lora needs the peft package: pip install 'clearhead[hf]', or take tune=full") from None
    targets: Any = config.lora_targets
    if targets == PEFT_DEFAULT:
        targets = None
    elif targets != ALL_LINEAR:
        targets = [name.strip() for name in targets.split(",")]
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # it is divided by the rank, a whole number or not
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        fan_in_fan_out=model.config.model_type == "gpt2",  # its maps are stored turned
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's own use of transformers
            around = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(
            f"model.lora_targets={config.lora_targets}: {' '.join(str(error).split())[:200]}; name modules of the "
            f"model, or take {ALL_LINEAR}"
        ) from error
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(parameter_seed(seed, name))
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
            elif ".lora_embedding_B." in name:
                nn.init.normal_(parameter, generator=generator)
    return around


def is_lora(name: str) -> bool:
    """Whether a parameter's name is one of LoRA's."""
    return PART in name
