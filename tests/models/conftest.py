from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.stirred import stir

from clearhead.models.config import ModelConfig
from clearhead.models.make import ARCHITECTURES, AnyModel

torch.set_num_threads(1)

MakeModel = Callable[..., AnyModel]


@pytest.fixture
def make_model() -> MakeModel:
    """A tiny float64 model whose every parameter matters: large weights, temperatures and gates off their start."""

    def make(seed: int = 0, **options: Any) -> AnyModel:
        sizes: dict[str, Any] = {"vocab_size": 31, "context": 32, "layers": 2, "width": 24, "heads": 4}
        config = ModelConfig(**(sizes | options))
        model = ARCHITECTURES[config.architecture](config).double().eval()
        stir(model, seed)
        return model

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 31, (3, 20), generator=torch.Generator().manual_seed(1))
