"""What the temperatures cost in parameters, counted on the models themselves.

"Weight sharing" is the re-use of W_q and W_v by the token part, which all granularities have here; they differ in how
many vectors there are. A model with a small vocabulary is small, so its share is the larger.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from clearhead.models.config import PRESETS, ModelConfig
from clearhead.models.stack import Stack
from experiments.selective import passkey
from experiments.selective.arms import BASELINE

GRANULARITIES = ("shared", "head_slice", "head_full")
CLAIMED = 0.005
"""The paper's figure with weight sharing: below half a percent."""
MODELS: dict[str, ModelConfig] = {
    **{name: PRESETS[name] for name in ("tiny", "small", "base")},
    "the lone passkey's": passkey.config(BASELINE, "none"),
    "the passkey's with keys": passkey.config(BASELINE, "keys"),
    "the shape of GPT-2 124M": replace(PRESETS["large"], feed_forward="gelu", norm="layer", position="learned"),
}


def count(config: ModelConfig, attention: str, granularity: str) -> dict[str, int]:
    """Parameters in all and of the temperatures, without making a tensor."""
    with torch.device("meta"):
        model = Stack(replace(config, attention=attention, temperature_granularity=granularity), layers=config.layers)
    counted = model.count_parameters()
    return {"total": counted["total"], "temperature": counted.get("temperature", 0)}


def expected(config: ModelConfig, granularity: str) -> int:
    """The temperatures' parameters by arithmetic: a slope and the vectors, for queries and for values."""
    total = 0
    for heads in (config.heads, config.key_value_heads):
        size = heads * config.head_size
        total += 1 + {"shared": size, "head_slice": size, "head_full": heads * size}[granularity]
    return config.layers * total


def table() -> list[dict[str, Any]]:
    """Every model and granularity: parameters added, as a share of the model without them."""
    rows = []
    for name, config in MODELS.items():
        plain = count(config, "softmax", GRANULARITIES[0])["total"]
        for granularity in GRANULARITIES:
            added = count(config, "softmax+selective", granularity)["total"] - plain
            rows.append(
                {"model": name, "plain": plain, "granularity": granularity, "added": added, "share": added / plain}
            )
    return rows
