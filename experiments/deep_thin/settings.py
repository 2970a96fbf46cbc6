"""What is compared, fixed before the runs: tasks, arms, sizes, learning rates, seeds. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clearhead.models.config import ModelConfig
from clearhead.train.config import OptimConfig

CHOOSING_SEED = 1000
"""Learning rates are chosen on one run with this seed, which the verdict never sees."""

DROPOUT = 0.1
"""In every arm: the scheme is calibrated for it, and it is what keeps the tokens of a deep stack apart."""


@dataclass(frozen=True)
class Shape:
    """Depth and widths. Of seq2seq, `layers` is the depth of each of the two stacks."""

    layers: int
    width: int
    heads: int
    hidden: int


@dataclass(frozen=True)
class Arm:
    """One way to spend the parameters."""

    name: str
    words: str
    deep: bool
    init: str = "xavier"
    placement: str = "pre"


SHALLOW = Arm("shallow", "shallow-wide, Xavier, Pre-LN", deep=False)
DEEP = Arm("deep", "deep-thin, Xavier, Pre-LN", deep=True)
DEEPSCALE = Arm("deepscale", "deep-thin, DeepScaleLM, Pre-LN", deep=True, init="deepscale")
DEEPSCALE_POST = Arm("deepscale-post", "deep-thin, DeepScaleLM, Post-LN", deep=True, init="deepscale", placement="post")

PAIRS = (
    (DEEPSCALE, SHALLOW),
    (DEEPSCALE_POST, SHALLOW),
    (DEEP, SHALLOW),
    (DEEPSCALE, DEEP),
)
"""Candidate and what it is measured against: the claim, depth alone, the scheme alone at the same depth."""


@dataclass(frozen=True)
class Setting:
    """One task at one size."""

    name: str
    title: str
    source: str
    """A text or pair source of `clearhead data list`, or digits, or fashion."""
    metric: str
    """What is judged; lower is better."""
    digits: int
    """Decimals in the tables."""
    shallow: Shape
    deep: Shape
    model: dict[str, Any]
    """Fields of `ModelConfig` that are the same in every arm."""
    arms: tuple[Arm, ...]
    rates: tuple[float, ...]
    seeds: int
    steps: int
    batch: int
    validate: int
    """Tokens (text) or images that choose the learning rate."""
    test: int
    """Tokens or images that are scored at the end, once."""

    def shape(self, arm: Arm) -> Shape:
        """The arm's depth and widths."""
        return self.deep if arm.deep else self.shallow

    def overrides(self, arm: Arm) -> dict[str, Any]:
        """The model fields that make the arm."""
        return {**dataclasses.asdict(self.shape(arm)), "init": arm.init, "norm_placement": arm.placement}

    def config(self, arm: Arm) -> ModelConfig:
        """The arm's model."""
        same = {"norm": "layer", "feed_forward": "gelu", "position": "learned", "dropout": DROPOUT}
        return ModelConfig.from_dict(same | self.model | self.overrides(arm))

    def optim(self, rate: float) -> OptimConfig:
        """AdamW with a tenth of the steps as warm-up, then a cosine, in every arm."""
        return OptimConfig(lr=rate, warmup_steps=max(1, self.steps // 10))

    def arm(self, name: str) -> Arm:
        """The arm called `name`."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def pairs(self) -> tuple[tuple[Arm, Arm], ...]:
        """The comparisons of this task."""
        return tuple(pair for pair in PAIRS if set(pair) <= set(self.arms))


THREE = (SHALLOW, DEEP, DEEPSCALE)
RATES = (1e-3, 3e-3, 1e-2)

SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            name="digits",
            title="Digits (8x8, 16 patches)",
            source="digits",
            metric="test error, %",
            digits=2,
            shallow=Shape(2, 64, 4, 256),
            deep=Shape(16, 24, 2, 80),
            model={"architecture": "encoder", "vocab_size": 10, "context": 16, "tie_embeddings": False},
            arms=(*THREE, DEEPSCALE_POST),
            rates=RATES,
            seeds=5,
            steps=200,
            batch=64,
            validate=300,
            test=420,
        ),
        Setting(
            name="language",
            title="Language modelling (shakespeare, bytes)",
            source="shakespeare",
            metric="test bits per byte",
            digits=4,
            shallow=Shape(2, 96, 4, 384),
            deep=Shape(16, 32, 2, 170),
            model={"vocab_size": 257, "context": 64},
            arms=THREE,
            rates=RATES,
            seeds=5,
            steps=400,
            batch=8,
            validate=16_384,
            test=32_768,
        ),
        Setting(
            name="translation",
            title="Translation (verses, English to German)",
            source="verses-en-de",
            metric="test nats per token",
            digits=4,
            shallow=Shape(2, 64, 4, 256),
            deep=Shape(8, 32, 2, 146),
            model={"architecture": "seq2seq", "vocab_size": 512, "context": 64},
            arms=THREE,
            rates=RATES,
            seeds=5,
            steps=200,
            batch=8,
            validate=8_192,
            test=4_096,
        ),
        Setting(
            name="fashion",
            title="Fashion-MNIST (28x28, 16 patches)",
            source="fashion",
            metric="test error, %",
            digits=2,
            shallow=Shape(2, 96, 4, 384),
            deep=Shape(16, 32, 2, 156),
            model={"architecture": "encoder", "vocab_size": 10, "context": 16, "tie_embeddings": False},
            arms=THREE,
            rates=RATES,
            seeds=5,
            steps=350,
            batch=32,
            validate=2_000,
            test=10_000,
        ),
    )
}
"""Full size: sums to the time in the README."""


def outside_embedding(counts: Mapping[str, int]) -> int:
    """Parameters without token or patch embedding, positions and output matrix."""
    return counts["total"] - sum(counts.get(part, 0) for part in ("embedding", "position", "head"))


def quick(setting: Setting) -> Setting:
    """A minute-sized version that shows that everything runs; its numbers say nothing."""
    return dataclasses.replace(
        setting,
        deep=dataclasses.replace(setting.deep, layers=4),
        arms=(SHALLOW, DEEPSCALE),
        rates=setting.rates[:2],
        seeds=2,
        steps=6,
        batch=4,
        validate=min(setting.validate, 256),
        test=min(setting.test, 256),
    )
