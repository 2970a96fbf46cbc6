"""Where the tokens of a batch stand: made once per forward, read by every layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clearhead.attention.bias import Bias
from clearhead.attention.mask import Mask
from clearhead.layers.position.rope import Rotation


@dataclass(frozen=True, eq=False)
class Geometry:
    """Positions and visibility of one forward.

    A dimension of 1 in the place of the batch means that all rows agree.
    """

    positions: Tensor
    """[1|b, t] int64: 0-based place of each token in its own document."""
    mask: Mask
    """What the call allows; `attend` adds the spec's own pattern."""
    visible: Tensor | None = None
    """[1|b, 1|h, t] int64: number of keys that each query sees, the spec's own pattern included. Counted for
    selective temperatures only."""
    own: Tensor | None = None
    """[1|b, 1|h, m] int64: what selective temperatures of keys and values count; None = `positions` + 1."""
    bias: Bias | None = None
    """Position term on the scores (ALiBi, T5)."""
    rotation: Rotation | None = None
    """Angles of the positions (rotary, Transformer-XL)."""
    key_rotation: Rotation | None = None
    """Angles of the keys that the call makes, where they are more than its tokens (memory); None = `rotation`."""

    @property
    def source_rotation(self) -> Rotation | None:
        """Angles of the keys."""
        return self.rotation if self.key_rotation is None else self.key_rotation
