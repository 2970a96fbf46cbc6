"""Cross attention: queries of one stack look at the output of another.

Legend: b batch, t tokens, s tokens of the source, w width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clearhead.layers.attention import Attention, Source
from clearhead.layers.geometry import Geometry


class SourceCache:
    """Keys and values of a source for one layer, made at the first step of decoding and read at every later one."""

    def __init__(self) -> None:
        self.source: Source | None = None

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was (beam search)."""
        if self.source is not None:
            held = self.source
            self.source = Source(
                held.key.index_select(0, index),
                held.value.index_select(0, index),
                _rows(held.key_temperature, index),
                _rows(held.value_temperature, index),
            )


@dataclass(frozen=True, eq=False)
class Cross:
    """What cross attention needs beside the source's states."""

    geometry: Geometry
    """Which of the source is visible. No positions: queries and keys count different texts."""
    held: SourceCache | None = None
    """While decoding; once it is filled, the states are not needed any more."""


class CrossAttention(Attention):
    """output(gate(attend(q(x), k(source), v(source)))); see `Attention`, whose parameters it has.

    The spec's pattern is left out (`models/build.py`): a window counts distances within one text.
    Shapes: x [b, t, width], source states [b, s, width] -> [b, t, width].
    """

    def forward(self, x_btw: Tensor, states_bsw: Tensor | None, cross: Cross) -> Tensor:  # type: ignore[override]
        """See the class. Raises `ValueError` when there is neither a source nor a filled cache."""
        held = cross.held
        source = None if held is None else held.source
        if source is None:
            if states_bsw is None:
                raise ValueError("cross attention: expected the source's states, or a state that has read a source")
            source = self.read(states_bsw, cross.geometry)
            if held is not None:
                held.source = source
        return self.look(x_btw, self.query(x_btw), source, cross.geometry)


def _rows(t: Tensor | None, index: Tensor) -> Tensor | None:
    return t if t is None or t.shape[0] == 1 else t.index_select(0, index)
