"""Softmax attention: PyTorch's own kernels where they fit, and the tile rule for the chunked kernel.

    s = softmax(x),   O = s V,   x = scale * Q K^T + bias over the visible keys

A row that sees no key gives output 0 and gradient 0. Shapes: b batch, h query heads, g key/value heads, n queries,
m keys, d head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clearhead.attention.bias import Bias
from clearhead.attention.mask import Mask
from clearhead.attention.precision import working_dtype
from clearhead.attention.spec import Softmax
from clearhead.attention.terms import Band, Causal, Rows, Term
from clearhead.kernels.chunked import ROWS
from clearhead.kernels.rule import Hidden, Scratch, TileRule, tile_rule

# A mask (or bias) larger than this is not written out for SDPA: the chunked kernel makes it tile by tile.
DENSE_MASK_LIMIT = 1 << 24


def mask_kind(mask: Mask, n: int, m: int) -> str:
    """How SDPA can be told this mask: "none", "causal" (its own top-left flag) or "dense"."""
    offset = mask.resolved_offset()
    if isinstance(offset, Tensor):
        return "dense"
    narrow = [t for t in mask.terms if not _sees_all(t, offset, n, m)]
    if not narrow:
        return "none"
    plain = all(isinstance(t, Causal) and t.prefix == 0 for t in narrow)
    return "causal" if plain and n == m and offset == 0 else "dense"


def _sees_all(term: Term, offset: int, n: int, m: int) -> bool:
    """Whether every query surely sees every key under this term; terms with tensors cannot tell."""
    if not isinstance(term, Causal | Band):
        return False
    low, high = term.sure_bounds(offset, offset + n - 1)
    return low <= 0 and high >= m


def refuse_sdpa(mask: Mask, bias: Bias | None, b: int, h: int, n: int, m: int) -> str | None:
    """Why SDPA should not serve this call, or None."""
    if bias is not None and bias.requires_grad:
        return "a bias that needs a gradient sends PyTorch's fused CPU kernel to its slow path"
    if bias is None and mask_kind(mask, n, m) != "dense":
        return None
    if mask.blocks is not None and (together := mask.blocks.width_of(ROWS)) < m:
        return f"it would compute all {m} keys of a pattern of which {ROWS} rows together see about {together}"
    if n * m > DENSE_MASK_LIMIT:
        return f"it would have to write out a {n} x {m} mask"
    widths = [t.left + t.right + 1 for t in mask.terms if isinstance(t, Band)]
    if widths and 2 * min(widths) < m:
        return f"it would compute all {m} keys of a window of {min(widths)}"
    return None


def sdpa_attention(
    q_bhnd: Tensor,
    k_bgmd: Tensor,
    v_bgmd: Tensor,
    mask: Mask,
    bias: Bias | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Call `scaled_dot_product_attention` with the cheapest form of the mask; never `is_causal` beside a mask."""
    n, m = q_bhnd.shape[2], k_bgmd.shape[2]
    grouped = q_bhnd.shape[1] != k_bgmd.shape[1]
    kind = mask_kind(mask, n, m)
    if bias is None and kind != "dense":
        return F.scaled_dot_product_attention(
            q_bhnd,
            k_bgmd,
            v_bgmd,
            dropout_p=dropout_p,
            is_causal=kind == "causal",
            scale=scale,
            enable_gqa=grouped,
        )
    device = q_bhnd.device
    rows = Rows(torch.arange(n, device=device), torch.arange(m, device=device), mask.resolved_offset())
    seen = mask.visible(rows)
    some: Tensor | None = None
    if seen is not None and mask.may_have_empty_rows(n, m):
        # A row that sees nothing is given all keys, so that no kernel divides by zero, and is zeroed afterwards.
        some = seen.any(dim=-1, keepdim=True)
        seen = seen | ~some
    if bias is None:
        told = seen
    else:
        told = bias.block(rows).to(working_dtype(q_bhnd.dtype))  # half precision would round distances
        if seen is not None:
            told = torch.where(seen, told, float("-inf"))
    if told is not None:
        told = told.expand(told.shape[0], told.shape[1], n, m)
    out = F.scaled_dot_product_attention(
        q_bhnd, k_bgmd, v_bgmd, attn_mask=told, dropout_p=dropout_p, scale=scale, enable_gqa=grouped
    )
    return out if some is None else out.masked_fill(~some, 0.0)


@tile_rule(Softmax)
class SoftmaxTile(TileRule):
    """The tile rule (see `kernels/rule.py`): a tile holds whole rows, so no running maximum is needed."""

    def __init__(self, choice: Softmax) -> None:
        self.scratch = Scratch("softmax")

    def weights(self, scores: Tensor, hide: Hidden) -> tuple[Tensor, Tensor | None]:
        """See `TileRule.weights`."""
        return hide.softmax(scores, out=self.scratch.take("s", scores.shape, scores)), None

    def backward(
        self, scores: Tensor, hide: Hidden, gradient_w: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """dx_i = s_i (g_i - sum_k s_k g_k), and sum_k s_k g_k = delta."""
        s, _ = self.weights(scores, hide)
        return gradient_w.sub_(delta).mul_(s), s, None
