"""A trained model's weights under another attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from clearhead.errors import UserError
from clearhead.models.make import ARCHITECTURES, AnyModel

OWN = ".features."
"""What an attention keeps that no other can use: a performer's projection and its count."""


def convert(model: AnyModel, attention: str, **changes: Any) -> AnyModel:
    """Return a new model with the weights of `model` and another attention (and other changes of its config).

    `convert(model, "performer")` makes a softmax model linear in length. The matrices of query, key, value and output
    fit as they are, but the function is another one: random features estimate each layer's attention, the errors add
    up over layers, and the model has to be trained on (arXiv 2009.14794, figure 5: a small part of the steps).
    Raises `UserError` when the new model would have parameters that the old one cannot give, or the other way round.
    """
    config = dataclasses.replace(model.config, attention=attention, **changes)
    weight = next(model.parameters())
    made = ARCHITECTURES[config.architecture](config).to(weight.device, weight.dtype)
    held, wanted = model.state_dict(), made.state_dict()
    both = held.keys() & wanted.keys()
    names = [*(held.keys() ^ wanted.keys()), *(name for name in both if held[name].shape != wanted[name].shape)]
    names = [name for name in names if OWN not in name]
    if names:
        raise UserError(
            f"convert to {config.attention}: {', '.join(sorted(names)[:3])} do not fit; change only what has no "
            "parameters of its own, or train the new model from scratch"
        )
    with torch.no_grad():
        made.load_state_dict({**wanted, **{name: t for name, t in held.items() if OWN not in name}})
    return made.train(model.training)
