"""A small vision transformer out of the package's own `Stack`: patches in place of tokens, classes in place of words.

The linear patch embedding stands where the token table stands, so that blocks, positions, residual rules and every
initialisation are the package's. Legend: b images, t patches, p pixels of a patch, w width, c classes.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

import clearhead
from clearhead.init.deepscale import embedding_std
from clearhead.layers.geometry import Geometry
from clearhead.models.config import ModelConfig
from clearhead.models.places import bidirectional_geometry
from clearhead.models.stack import Stack
from experiments.deep_thin.images import patch_correlation


class PatchEncoder(Stack):
    """logits = head(mean over patches of the encoder's last states); `config.vocab_size` is the number of classes.

    DeepScaleLM wants a first stream of variance 1 after dropout, (1 - p) / 2 from each of two tables. A linear map
    drawn with variance 1 / fan-in keeps the variance of its input, so the pixels, of variance 1, are multiplied by
    the root of (1 - p) / 2, in every arm.
    """

    def __init__(self, config: ModelConfig, pixels: int) -> None:
        super().__init__(config, layers=config.layers, bidirectional=True)
        self.embedding: nn.Module = nn.Linear(pixels, config.width, bias=False)  # type: ignore[assignment]
        self.pixel_scale = embedding_std(config.dropout, config.embedding_tables)

    def embed(self, tokens_bt: Tensor, geometry: Geometry, segment_types: Tensor | None = None) -> Tensor:
        """The first stream of patches [b, t, p]."""
        assert self.position is not None
        x_btw = self.embedding(tokens_bt * self.pixel_scale) + self.position(geometry.positions)
        return self.dropout(self.embedding_norm(x_btw))

    def forward(self, patches_btp: Tensor) -> Tensor:
        """[b, t, p] -> logits [b, c]."""
        geometry = bidirectional_geometry(self.config, self.relative, patches_btp[..., 0], None, None)
        x_btw = self.transform(self.embed(patches_btp, geometry), geometry)
        return self.logits(x_btw.mean(dim=1))


def build(config: ModelConfig, patches_btp: Tensor, seed: int) -> PatchEncoder:
    """The model of a config. For DeepScaleLM r0 is read from `patches_btp`, a batch of training images.

    Positions never repeat, so that the two tables together have half of the patches' correlation.
    """
    model = PatchEncoder(config, patches_btp.shape[-1])
    options = {}
    if config.init == "deepscale":
        options["embedding_correlation"] = patch_correlation(patches_btp) / config.embedding_tables
    clearhead.init_(model, config.init, seed=seed, **options)
    return model.train()


@torch.no_grad()
def score(model: nn.Module, patches_btp: Tensor, classes: Tensor, batch: int = 500) -> tuple[float, float]:
    """Share of wrong classes in %, and mean nats."""
    was_training = model.training
    model.eval()
    wrong, nats = 0, 0.0
    for first in range(0, len(classes), batch):
        rows = slice(first, first + batch)
        logits_bc = model(patches_btp[rows])
        wrong += int((logits_bc.argmax(dim=1) != classes[rows]).sum())
        nats += float(nn.functional.cross_entropy(logits_bc, classes[rows], reduction="sum"))
    model.train(was_training)
    return 100.0 * wrong / len(classes), nats / len(classes)
