from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clearhead.data.config import DataConfig
from clearhead.models.config import ModelConfig
from clearhead.train.config import OptimConfig, RunConfig, TrainConfig


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A folder of ten short documents of made-up words, the same in every session."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(40)]
    for number in range(10):
        lines = " ".join(draw.choices(words, k=250 + 40 * number))
        (folder / f"{number}.txt").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(autouse=True)
def _own_cache(data_cache, monkeypatch):
    monkeypatch.setenv("CLEARHEAD_DATA", str(data_cache))


@pytest.fixture
def config(text) -> Callable[..., RunConfig]:
    """Make a tiny run: options of the loop by keyword, of the other parts as dicts."""

    def make(*, model: dict[str, Any] | None = None, optim: dict[str, Any] | None = None, **train: Any) -> RunConfig:
        base = RunConfig(
            model=ModelConfig(layers=1, width=16, heads=2, context=32, dropout=0.1, attention="softmax+selective"),
            data=DataConfig(source=str(text), context=32, val_fraction=0.2, test_fraction=0.2),
            optim=OptimConfig(lr=1e-2, warmup_steps=2),
            train=TrainConfig(
                steps=12, batch_size=4, eval_every=5, eval_tokens=256, test_tokens=512, log_every=1, checkpoint_every=4,
                threads=1,
            ),
        )  # fmt: skip
        return dataclasses.replace(
            base,
            model=dataclasses.replace(base.model, **(model or {})),
            optim=dataclasses.replace(base.optim, **(optim or {})),
            train=dataclasses.replace(base.train, **train),
        )

    return make
