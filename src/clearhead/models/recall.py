"""What a decoder's layers see when they look back on a memory: a `Geometry` for each length of memory.

Legend: b batch, n tokens of a call, m keys that were there before, s = m + n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clearhead.attention.mask import Mask
from clearhead.attention.spec import Selective
from clearhead.attention.terms import Band
from clearhead.layers.geometry import Geometry
from clearhead.layers.position.score import ScorePosition
from clearhead.memory.transformer_xl import Entered
from clearhead.models.config import ModelConfig
from clearhead.models.places import position_bias, position_rotation


@dataclass(frozen=True)
class Reach:
    """What one layer looks back on: `held` keys before this call, of which `kept` are kept as keys already (the others
    are made anew from the memory), and no further back than `window` tokens, if there is one."""

    held: int
    kept: int = 0
    window: int | None = None


def recall_geometries(
    config: ModelConfig,
    relative: ScorePosition | None,
    entered: Entered,
    document_bm: Tensor,
    place_bm: Tensor,
    reaches: Sequence[Reach],
    *,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Geometry]:
    """A decoder's geometry for each layer; layers of equal reach share one.

    Args:
        document_bm, place_bm: of the slots before this call; a layer that holds fewer has the last of them.
        first: distance of the call's first token from where positions are counted: tokens of the segment before it.
        dtype: of the angles.

    Positions are counted from the segment's first token, the memory's below zero, so that they stay small however long
    the stream is.
    """
    made: dict[Reach, Geometry] = {}
    for reach in reaches:
        if reach not in made:
            made[reach] = _geometry(config, relative, entered, document_bm, place_bm, reach, first, dtype)
    return [made[reach] for reach in reaches]


def _geometry(
    config: ModelConfig,
    relative: ScorePosition | None,
    entered: Entered,
    document_bm: Tensor,
    place_bm: Tensor,
    reach: Reach,
    first: int,
    dtype: torch.dtype,
) -> Geometry:
    n, device = entered.document.shape[1], entered.document.device
    m = reach.held
    old = slice(document_bm.shape[1] - m, None)
    mask = Mask.causal(m)
    if reach.window is not None:
        mask = Mask((*mask.terms, Band(reach.window, 0)), m)
    if not entered.plain:
        keys_bs = torch.cat((document_bm[:, old], entered.document), dim=1)
        mask = mask & Mask.segments(entered.document, keys_bs)
    visible = own = None
    if isinstance(config.spec.temperature, Selective):
        visible = config.spec.pattern.within(mask, config.heads, m + n).visible_count(n, m + n, device)
        place_bs = torch.cat((place_bm[:, old], entered.place), dim=1)
        own = place_bs[:, None, reach.kept :] + 1
    at = torch.arange(first - m + reach.kept, first + n, device=device)[None]
    return Geometry(
        positions=entered.place,
        mask=mask,
        visible=visible,
        own=own,
        bias=position_bias(config, relative, device),
        rotation=position_rotation(config, at[:, at.shape[1] - n :], dtype),
        key_rotation=position_rotation(config, at, dtype),
    )
