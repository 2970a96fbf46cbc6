"""The grid: fixed, with the thresholds of clearhead.signal.verdicts, before any of its runs.

depth x norm placement x initialisation x width x dropout, on the successor task, half of it where published experience
expects no learning (deep Post-LN with Xavier), half where it expects some. Runs that set the thresholds are in
`CALIBRATION` and are not part of the grid.
"""

from __future__ import annotations

from itertools import product

from clearhead.models.config import ModelConfig
from experiments.trainability.task import SuccessorTask

TASK = SuccessorTask()
LR = 3e-4
STEPS = 300


def config(layers: int, width: int, dropout: float, norm_placement: str, init: str) -> ModelConfig:
    """A decoder of the grid: ReLU, LayerNorm, learned positions, four heads, a feed-forward twice as wide."""
    return ModelConfig(
        vocab_size=TASK.vocab,
        context=TASK.tokens,
        layers=layers,
        width=width,
        heads=4,
        hidden=2 * width,
        feed_forward="relu",
        norm="layer",
        norm_placement=norm_placement,
        position="learned",
        tie_embeddings=False,
        init=init,
        dropout=dropout,
    )


def grid() -> dict[str, ModelConfig]:
    """Every configuration by its name."""
    points: list[tuple[int, int, float, str, str]] = []
    points += product((13, 16, 20, 26, 34, 42), (32, 64, 96), (0.0, 0.1), ("post",), ("xavier",))  # 36
    points += product((7, 10), (32, 64), (0.0, 0.1), ("post",), ("xavier",))  # 8, near the edge
    points += product((3, 5), (32, 64), (0.0, 0.1), ("post",), ("xavier",))  # 8
    points += product((16, 40), (64,), (0.0, 0.1), ("post",), ("standard", "deepscale", "admin_constant"))  # 12
    points += product((16, 40), (64,), (0.1,), ("post",), ("small", "admin"))  # 4
    points += product((16, 40), (64,), (0.0,), ("pre",), ("xavier", "standard", "small", "deepscale"))  # 8
    points += product((40,), (96,), (0.1,), ("pre",), ("xavier", "deepscale"))  # 2
    return {
        f"{init}-{placement}-{layers}x{width}-p{dropout:g}": config(layers, width, dropout, placement, init)
        for layers, width, dropout, placement, init in points
    }


CALIBRATION: tuple[tuple[int, int, float, str, str], ...] = (
    (6, 64, 0.0, "post", "xavier"),
    (8, 64, 0.0, "post", "xavier"),
    (12, 64, 0.0, "post", "xavier"),
    (16, 64, 0.0, "post", "xavier"),
    (12, 64, 0.1, "post", "xavier"),
    (24, 64, 0.1, "post", "xavier"),
    (12, 128, 0.0, "post", "xavier"),
    (48, 64, 0.1, "post", "xavier"),
    (96, 64, 0.0, "post", "xavier"),
    (96, 64, 0.0, "post", "standard"),
    (96, 64, 0.0, "pre", "xavier"),
    (96, 64, 0.0, "pre", "standard"),
)
"""(layers, width, dropout, placement, init) of the runs that set the thresholds, at 150 steps."""
