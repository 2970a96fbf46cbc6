"""A pretrained model under another attention, for the length of a block."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import clearhead as ch
from clearhead.data.models import MODELS, model_folder

OWN = "its own"
"""The arm that is not patched."""
UNIFORM = "uniform"
"""The control: queries of zero, so that every key weighs the same; what a task is when attention says nothing."""

_QUERIES = ("query", "q_proj")


def opened(name: str) -> Any:
    """The model called `name`, in fp32 and in evaluation. Raises `UserError` with the command that fetches it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = model_folder(name)
    architecture = getattr(transformers, MODELS[name].architecture)
    settings = {} if name == "whisper-tiny" else {"attention_probs_dropout_prob": 0.0}
    return architecture.from_pretrained(folder, dtype=torch.float32, **settings).eval()


def tokenizer(name: str) -> Any:
    """Its tokenizer."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(model_folder(name))


@contextmanager
def under(model: Any, attention: str) -> Iterator[Any]:
    """Yield the model under a spec (patched, and given back afterwards), `OWN`, or `UNIFORM` (a copy)."""
    if attention == OWN:
        yield model
    elif attention == UNIFORM:
        yield without_queries(model)
    else:
        ch.hf.patch(model, attention)
        try:
            yield model
        finally:
            ch.hf.unpatch(model)


def without_queries(model: Any) -> Any:
    """A copy whose query projections give zero, so that all scores are 0."""
    plain = copy.deepcopy(model)
    silenced = 0
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in _QUERIES:
                module.weight.zero_()
                if module.bias is not None:
                    module.bias.zero_()
                silenced += 1
    if not silenced:
        raise ValueError(f"{type(model).__name__}: no query projection was found")
    return plain
