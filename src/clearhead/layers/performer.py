"""The random features that an attention layer of performer weights owns, and when it draws new ones.

Legend: m projections, d head dim.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.attention.projection import projection_of
from clearhead.attention.spec import Performer


class PerformerFeatures(nn.Module):
    """The projection of one layer, [m, d], shared by its heads: new every `spec.redraw` forwards in training.

    Both buffers are saved with the model. A draw is a function of (seed, the layer's number, how many came before), so
    processes that train together, and a run that goes on, draw the same without a word. A forward in training counts,
    whatever becomes of it: one that is computed again for its backward pass (activation checkpointing) counts twice.
    """

    projection: Tensor
    forwards: Tensor

    def __init__(self, spec: Performer, head_dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.every = spec.redraw
        self.place = 0
        self.register_buffer("projection", projection_of(spec, head_dim))
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def start(self, place: int) -> None:
        """Become layer number `place`, with its first draw."""
        self.place = place
        self.projection.copy_(projection_of(self.spec, self.projection.shape[1], place=place))
        self.forwards.zero_()

    def freeze(self) -> None:
        """Keep the projection from now on."""
        self.every = 0

    def forward(self) -> Tensor:
        """The rows of this forward, [m, d]."""
        if not (self.training and self.every):
            return self.projection
        numbers = [self.every, self.place, self.spec.seed]
        count_and_draw(self.projection, self.forwards, self.spec.kernel, numbers)
        return self.projection.clone()  # a later forward may write to the buffer before this one's backward pass


@torch.library.custom_op("clearhead::count_and_draw", mutates_args=("projection", "forwards"))
def count_and_draw(projection: Tensor, forwards: Tensor, kernel: str, numbers: list[int]) -> None:
    """Count a forward, and draw anew where `every` of them have passed; an operator, since compiled graphs cannot look.

    numbers: every, place, seed.
    """
    every, place, seed = numbers
    done = int(forwards)
    forwards += 1
    if done and done % every == 0:
        features, head_dim = projection.shape
        choice = Performer(kernel, features, every, seed)
        projection.copy_(projection_of(choice, head_dim, place=place, draw=done // every))


@count_and_draw.register_fake
def _(projection, forwards, kernel, numbers):  # type: ignore[no-untyped-def]
    return None
