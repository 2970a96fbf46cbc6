"""Masks as torch's layers take them, read into a `Mask` (visibility) and a `Bias` (what is added to scores).

torch.nn's convention is the other way round than that of its own scaled_dot_product_attention: in a bool mask True
means *not* attended to. Float masks are added to the scores; entries at or below half the dtype's minimum hide a key.
torch's encoders turn bool masks into float ones of 0 and -inf before a layer sees them, so a float mask often says
nothing but visibility: found out once per tensor and remembered, since the answer is read on the host.

Legend: b batch, h heads, n queries, m keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from clearhead.attention.bias import DenseBias
from clearhead.attention.mask import Mask

_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class Seen:
    """What a call may see, its offset decided (torch aligns causality top-left), and what is added to its scores."""

    mask: Mask
    bias: DenseBias | None = None
    first: Tensor | None = None
    """[b] int64: where the valid keys of a row begin; None = at the first key."""


def read_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    sizes: tuple[int, int, int, int],
    *,
    scores: bool = True,
) -> Seen:
    """Read the masks of `nn.MultiheadAttention.forward` for `sizes` = (b, h, n, m).

    attn_mask: [n, m] or [b * h, n, m]. key_padding_mask: [b, m]. Each bool (True = hidden) or float (added).
    is_causal: torch's hint that attn_mask is the causal mask. It is checked: a mask that is exactly causal becomes
        `Mask.causal`, any other is used as it is. A compiled graph cannot look; it asserts the promise when it runs.
        Without a mask it means causal.
    scores: False = there are no scores to add to (performer): a float mask may hold 0 and -inf alone.

    Raises `ValueError` for shapes that do not fit and for added values where there are no scores, `TypeError` for
    masks that are neither bool nor float.
    """
    b, h, n, m = sizes
    mask, added, first = Mask(offset=0), None, None
    if attn_mask is not None:
        _check("attn_mask", attn_mask, ((n, m), (b * h, n, m)))
    if is_causal and (attn_mask is None or _is_causal(attn_mask)):
        mask = Mask.causal(0)
    elif attn_mask is not None and not scores:
        raise ValueError(
            "attn_mask: performer sums over features and never makes a score to mask or to add to; padding goes into "
            "key_padding_mask, causality is is_causal=True (beside a causal mask, or alone)"
        )
    elif attn_mask is not None:
        full = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.view(b, h, n, m)
        seen, added = _split(attn_mask, full, "attn_mask", scores)
        mask = mask & Mask.dense(seen)
    if key_padding_mask is not None:
        _check("key_padding_mask", key_padding_mask, ((b, m),))
        valid, more = _split(key_padding_mask, key_padding_mask, "key_padding_mask", scores)
        # The range says where a row's text lies, for patterns; keys between may be hidden too.
        first, end = _bounds(valid)
        mask = mask & Mask.key_range(first, end)
        mask = mask & Mask.dense(valid[:, None, None])
        if more is not None:
            more = more[:, None, None]
            added = more if added is None else added + more
    return Seen(mask, None if added is None else DenseBias(added), first)


def _bounds(valid_bm: Tensor) -> tuple[Tensor, Tensor]:
    """The first valid key of each row and the one after the last, [b]; m and m for a row without any."""
    m, some = valid_bm.shape[1], valid_bm.any(dim=1)
    keys = valid_bm.to(torch.int8)
    first, last = keys.argmax(dim=1), m - keys.flip(1).argmax(dim=1)
    return torch.where(some, first, m), torch.where(some, last, m)


def _split(given: Tensor, full: Tensor, name: str, scores: bool) -> tuple[Tensor, Tensor | None]:
    """Visibility, and what is added where something is seen; `full` is `given` in another shape."""
    if full.dtype == torch.bool:
        return ~full, None
    seen = full > torch.finfo(full.dtype).min / 2
    if scores and (torch.compiler.is_compiling() or given.requires_grad):
        return seen, torch.where(seen, full, 0.0)
    adds = (
        f"{name}: performer never makes a score to add to; expected a bool mask, or a float one of 0 and -inf "
        "alone, got other values"
    )
    if torch.compiler.is_compiling():
        torch._assert_async((~seen | (full == 0.0)).all(), adds)
        return seen, None
    if not scores and given.requires_grad:
        raise ValueError(adds)
    if _remembered(given, name, lambda: bool((~seen | (full == 0.0)).all())):
        return seen, None
    if not scores:
        raise ValueError(adds)
    return seen, torch.where(seen, full, 0.0)


def _is_causal(mask: Tensor) -> bool:
    """Whether a mask that is promised to be causal is: 0 or False up to the diagonal, hidden above it."""

    def look() -> Tensor:
        hidden = mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
        same = (hidden == torch.ones_like(hidden).triu(1)).all()
        return same if mask.dtype == torch.bool else same & ((mask == 0.0) | hidden).all()

    if torch.compiler.is_compiling():
        promise = "is_causal=True promises that attn_mask is the causal mask, and this one is not; leave is_causal out"
        torch._assert_async(look(), promise)
        return True
    if mask.requires_grad:
        return False
    return _remembered(mask, "causal", lambda: bool(look()))


def _remembered(mask: Tensor, question: str, look: Callable[[], bool]) -> bool:
    """Answer a question about a mask once: the same tensor goes through all layers, and looking waits for the GPU."""
    if mask.is_inference():  # has no version that would tell of changes in place
        return look()
    answers = _KNOWN.setdefault(mask, {})
    known = answers.get(question)
    if known is None or known[0] != mask._version:
        known = answers[question] = (mask._version, look())
    return bool(known[1])


def _check(name: str, mask: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: expected bool (True = hidden) or float (added to scores), got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name}: expected {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")
