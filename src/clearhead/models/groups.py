"""Optimizer groups: which parameters decay, and which have their own learning rate."""

from __future__ import annotations

from typing import Any

import torch.nn as nn

from clearhead.layers.gate import FixedGate
from clearhead.layers.position.relative_key import RelativeKey
from clearhead.layers.position.score import ScorePosition
from clearhead.layers.residual import OmegaSum
from clearhead.layers.temperature import LearnedTemperatures, SelectiveTemperatures


def parameter_groups(model: nn.Module, *, temperature_lr_scale: float = 1.0) -> list[dict[str, Any]]:
    """Return dicts {"name", "params", "weight_decay_scale", "lr_scale"}; an empty group is left out.

    - matrices: weights of linear maps; decayed.
    - no_decay: embeddings (and with them a tied output matrix), norms, biases, relative positions, fixed gates, and the
      mixture of a feedback memory.
    - temperature: everything inside a temperature; never decayed (decay would pull alpha to 0, a slope of 0.5), with
      the learning rate times `temperature_lr_scale`.
    - residual: Admin's omega; never decayed (decay would pull it to 0, toward a heavier dependency on the branches).

    Raises `RuntimeError` if a parameter is in no group or in two.
    """
    temperature = _parameters_below(model, SelectiveTemperatures | LearnedTemperatures)
    residual = _parameters_below(model, OmegaSum)
    plain = _parameters_below(model, nn.Embedding | nn.LayerNorm | nn.RMSNorm | FixedGate | ScorePosition | RelativeKey)
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "no_decay": [], "temperature": [], "residual": []}
    for parameter in model.parameters():
        if id(parameter) in temperature:
            groups["temperature"].append(parameter)
        elif id(parameter) in residual:
            groups["residual"].append(parameter)
        elif id(parameter) in plain or parameter.dim() < 2:
            groups["no_decay"].append(parameter)
        else:
            groups["matrices"].append(parameter)

    listed = [id(parameter) for params in groups.values() for parameter in params]
    if sorted(listed) != sorted(id(parameter) for parameter in model.parameters()):
        raise RuntimeError("parameter_groups: expected every parameter in exactly one group")
    return [
        {
            "name": name,
            "params": params,
            "weight_decay_scale": 1.0 if name == "matrices" else 0.0,
            "lr_scale": temperature_lr_scale if name == "temperature" else 1.0,
        }
        for name, params in groups.items()
        if params
    ]


def _parameters_below(model: nn.Module, kinds: Any) -> set[int]:
    return {
        id(parameter) for module in model.modules() if isinstance(module, kinds) for parameter in module.parameters()
    }
