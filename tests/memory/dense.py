"""One full-length forward with a mask per layer, written out on paper's formulas: what segment recurrence must equal.

Nothing of attention, positions, masks or temperatures is the package's; the linear maps, norms and feed-forwards are
the model's own modules. Shapes: b batch, t tokens, h heads, d head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def staircase(tokens: int, segment: int, length: int) -> torch.Tensor:
    """[t, t]: j <= i and j >= the beginning of i's segment - length."""
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    return (j <= i) & (j >= i.div(segment, rounding_mode="floor") * segment - length)


def sliding(tokens: int, length: int) -> torch.Tensor:
    """[t, t]: j <= i and i - j <= length."""
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    return (j <= i) & (i - j <= length)


def places(documents_bt: torch.Tensor) -> torch.Tensor:
    """[b, t]: 0-based place of each token in its run of equal numbers."""
    made = torch.zeros_like(documents_bt)
    for row, numbers in enumerate(documents_bt.tolist()):
        for t in range(1, len(numbers)):
            made[row, t] = made[row, t - 1] + 1 if numbers[t] == numbers[t - 1] else 0
    return made


def dense_forward(model, tokens_bt, masks_ltt, documents_bt=None):
    """Logits of one pass over all tokens; `masks_ltt` says what each layer sees within a document."""
    documents_bt = torch.zeros_like(tokens_bt) if documents_bt is None else documents_bt
    same_btt = documents_bt[:, :, None] == documents_bt[:, None]
    x = model.embedding(tokens_bt)
    for block, mask_tt in zip(model.blocks, masks_ltt, strict=True):
        see_btt = same_btt & mask_tt
        pre = model.config.norm_placement == "pre"
        norm, norm_after = block.attention_residual.norm, block.feed_forward_residual.norm
        if pre:
            x = x + attention(model.config, block.attention, norm(x), see_btt, places(documents_bt))
            x = x + block.feed_forward(norm_after(x))
        else:
            x = norm(x + attention(model.config, block.attention, x, see_btt, places(documents_bt)))
            x = norm_after(x + block.feed_forward(x))
    return model.head(model.norm(x))


def attention(config, layer, x, see_btt, places_bt):
    b, t, _ = x.shape
    h, d = config.heads, config.head_size
    q, k, v = (part(x).view(b, t, h, d).transpose(1, 2) for part in (layer.query, layer.key, layer.value))
    see = see_btt[:, None]
    scores = score(config, layer, q, k) / math.sqrt(d)
    if "selective" in config.attention:
        tau = temperature(layer.temperatures.query, q, see_btt.sum(-1))
        scores = scores * tau[..., None]
        v = v * temperature(layer.temperatures.value, v, places_bt + 1)[..., None]
    s = scores.masked_fill(~see, -math.inf).softmax(-1)
    if "self_adjust" in config.attention:
        low = scores.masked_fill(~see, math.inf).amin(-1, keepdim=True).clamp(max=0.0)
        high = scores.masked_fill(~see, -math.inf).amax(-1, keepdim=True).clamp(min=0.0)
        s = s * (scores - low) / (high - low + 1e-10)
    out = torch.log(s @ v.exp()) if "laser" in config.attention else s @ v
    return layer.output(out.transpose(1, 2).reshape(b, t, h * d))


def temperature(part, projected_bhtd, count_bt):
    token = torch.tanh(torch.einsum("hd,bhtd->bht", part.token.vector, F.gelu(projected_bhtd)))
    return 1 + token + torch.sigmoid(part.position.slope) * torch.log(count_bt.double())[:, None]


def score(config, layer, q, k):
    """[b, h, t, t] before the scale, by the papers' own formulas."""
    t, d = q.shape[2], q.shape[3]
    distance = torch.arange(t)[:, None] - torch.arange(t)[None]
    if config.position == "xl":  # (q + u) k_j + (q + v) W R_{i-j}
        own = layer.relative
        u, v = own.content_bias.view(-1, 1, d), own.distance_bias.view(-1, 1, d)
        p = own.width
        w = 10000.0 ** (-2.0 * torch.arange(p // 2).double() / p)
        angle = distance[..., None].double() * w
        r = torch.cat((angle.sin(), angle.cos()), dim=-1)  # [t, t, p]
        projected = torch.einsum("hdp,ijp->hijd", own.distance.weight.view(-1, d, p), r)
        return (q + u) @ k.mT + torch.einsum("bhid,hijd->bhij", q + v, projected)
    if config.position == "rope":  # pairs as complex numbers: q conj(k) turned by the distance
        w = config.rope_base ** (-2.0 * torch.arange(d // 2).double() / d)
        qc, kc = (torch.complex(x[..., : d // 2], x[..., d // 2 :]) for x in (q, k))
        turn = torch.polar(torch.ones(()).double(), distance[..., None].double() * w)
        return torch.einsum("bhid,bhjd,ijd->bhij", qc, kc.conj(), turn).real
    if config.position == "alibi":
        slopes = 2.0 ** (-8.0 * torch.arange(1, config.heads + 1).double() / config.heads)
        return q @ k.mT - slopes[:, None, None] * distance.abs() * math.sqrt(d)
    return q @ k.mT
