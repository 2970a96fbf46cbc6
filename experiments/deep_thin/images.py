"""Images as sequences of patches, in a fixed split: handwritten digits (scikit-learn) and Fashion-MNIST (Debian).

Pixels are standardised by the mean and deviation of the training split.
Legend: b images, t patches, p pixels of a patch.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clearhead.errors import UserError

FASHION = Path("/usr/share/datasets/fashion-mnist")
GET_FASHION = "apt-get install -y --no-install-recommends dataset-fashion-mnist"
GET_DIGITS = "pip install scikit-learn"
SPLIT_SEED = 0

Arrays = Mapping[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]


@dataclass(frozen=True)
class Split:
    """Patches [b, t, p] and classes [b]."""

    patches: Tensor
    classes: Tensor


def load(name: str) -> dict[str, Split]:
    """train, val and test of `digits` or `fashion`. Raises `UserError` with the command that brings what is missing."""
    arrays, side = (_digits(), 2) if name == "digits" else (_fashion(), 7)
    pixels = arrays["train"][0]
    mean, deviation = float(pixels.mean()), float(pixels.std())
    return {
        split: Split(
            patches_of(torch.from_numpy((images - mean) / deviation), side), torch.from_numpy(classes.astype(np.int64))
        )
        for split, (images, classes) in arrays.items()
    }


def patches_of(images: Tensor, side: int) -> Tensor:
    """[b, rows, columns] -> [b, t, side * side], row by row."""
    tiles = images.unfold(1, side, side).unfold(2, side, side)
    return tiles.reshape(len(images), -1, side * side).contiguous()


def patch_correlation(patches_btp: Tensor) -> float:
    """Token correlation that random linear projections of the patches have, from 0 on.

    A projection w with independent entries of mean 0 gives tokens of covariance E<x_i, x_j> and variance E<x_i, x_i>
    (both times Var w), so their ratio over pairs i != j is the correlation. The mean is kept: w has none.
    """
    x = patches_btp.double()
    tokens = x.shape[1]
    own = float(x.square().sum())
    pairs = float(x.sum(dim=1).square().sum()) - own
    return max(0.0, pairs / (tokens - 1) / own)


def _digits() -> Arrays:
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        raise UserError(f"digits come with scikit-learn, which is not installed; run: {GET_DIGITS}") from None
    images, classes = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.float32)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    test, val, train = order[:420], order[420:720], order[720:]
    return {name: (images[i], classes[i]) for name, i in (("train", train), ("val", val), ("test", test))}


def _fashion() -> Arrays:
    train, test = (_read_fashion(part) for part in ("train", "t10k"))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train[0]))
    val, rest = order[:10_000], order[10_000:]
    return {
        "train": (train[0][rest], train[1][rest]),
        "val": (train[0][val], train[1][val]),
        "test": test,
    }


def _read_fashion(part: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    try:
        with gzip.open(FASHION / f"{part}-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16)
        with gzip.open(FASHION / f"{part}-labels-idx1-ubyte.gz") as file:
            classes = np.frombuffer(file.read(), np.uint8, offset=8)
    except OSError:
        raise UserError(f"Fashion-MNIST is not at {FASHION}; run: {GET_FASHION}") from None
    return images.reshape(-1, 28, 28).astype(np.float32), classes.astype(np.int64)
