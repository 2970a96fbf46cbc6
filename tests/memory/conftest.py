from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from clearhead.models.config import ModelConfig
from clearhead.models.decoder import Decoder
from tests.stirred import stir

torch.set_num_threads(1)


@pytest.fixture
def make_decoder() -> Callable[..., Decoder]:
    """A tiny float64 decoder whose every parameter matters."""

    def make(seed: int = 0, **options: Any) -> Decoder:
        sizes: dict[str, Any] = {"vocab_size": 31, "context": 7, "layers": 3, "width": 24, "heads": 4, "position": "xl"}
        model = Decoder(ModelConfig(**(sizes | options))).double().eval()
        stir(model, seed)
        return model

    return make


@pytest.fixture
def stream_tokens() -> torch.Tensor:
    """Three segments of 7 and the beginning of a fourth."""
    return torch.randint(0, 31, (3, 23), generator=torch.Generator().manual_seed(1))
