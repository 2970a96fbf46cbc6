"""The configuration of a fine-tuning run: a pretrained model, its own tokenizer, and rates that fit what learns.

Imports no torch, so that a mistake is reported before anything heavy is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clearhead.data.config import DataConfig
from clearhead.data.pretrained_folder import read_positions
from clearhead.errors import unknown
from clearhead.models.pretrained_config import TUNES, PretrainedConfig
from clearhead.train.config import OptimConfig, RunConfig, TrainConfig

CONTEXT, STEPS = 256, 80
"""Sized for two cores and SmolLM2: about a second a step. A model with fewer positions gets those."""


@dataclass(frozen=True)
class Rates:
    """Peak learning rate, what the temperatures' is a multiple of it, and the decay of matrices."""

    lr: float
    temperature_lr_scale: float
    weight_decay: float


RATES: dict[str, Rates] = {
    "lora": Rates(lr=5e-4, temperature_lr_scale=10.0, weight_decay=0.0),
    "temperature": Rates(lr=5e-3, temperature_lr_scale=1.0, weight_decay=0.0),
    "full": Rates(lr=2e-5, temperature_lr_scale=250.0, weight_decay=0.01),
}
"""By what learns. The temperatures get 5e-3 in each: they begin at the identity and have few parameters."""


def finetune_config(
    source: str,
    *,
    attention: str = "softmax+selective",
    tune: str = "lora",
    data: str = "shakespeare",
    context: int | None = None,
    steps: int = STEPS,
    model: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
) -> RunConfig:
    """Return the run that fine-tunes a model on disk; `model`, `optim` and `train` are further fields of its parts.

    context: None = `CONTEXT`, or the model's positions where they are fewer.

    Raises `UserError` as `PretrainedConfig.of` does, and where the fields disagree.
    """
    if tune not in RATES:
        raise unknown("model.tune", tune, TUNES)
    rates = RATES[tune]
    options: dict[str, Any] = {"temperature_lr_scale": rates.temperature_lr_scale} | (model or {})
    if context is None:
        context = min(CONTEXT, read_positions(source) or CONTEXT)
    pretrained = PretrainedConfig.of(source, attention=attention, tune=tune, context=context, **options)
    from clearhead.data.pretrained_tokenizer import PretrainedTokenizer

    ids = PretrainedTokenizer.of_model(pretrained.source).vocab_size
    schedule = {"lr": rates.lr, "weight_decay": rates.weight_decay, "warmup_steps": steps // 10}
    loop = {
        "batch_size": 1,
        "eval_every": max(1, steps // 2),
        "eval_tokens": 2_048,
        "test_tokens": 8_192,
        "checkpoint_every": max(1, steps // 2),
        "log_every": 1,
    }
    return RunConfig(
        model=pretrained,
        data=DataConfig(
            source=data, tokenizer="pretrained", tokenizer_of=pretrained.source, vocab_size=ids, context=context
        ),
        optim=OptimConfig(**(schedule | (optim or {}))),
        train=TrainConfig(steps=steps, **(loop | (train or {}))),
    )
