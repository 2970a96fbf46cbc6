"""Linear attention, chunked: time and memory linear in length, features made again in the backward pass.

    out_i = sum_j P_ij v_j / sum_j P_ij,   P_ij = phi(x_i) . phi(y_j),   x = sqrt(scale) q,  y = sqrt(scale) k

over the keys that i sees (arXiv 2009.14794, eq. 4 and 11). Causal in chunks of C positions:

    within a chunk   P_ij = (A_i . B_j) exp(c_j - M_i)
    from before      exp(M' - M_i) A_i S,   S = sum_j exp(c_j - M') B_j [v_j, 1]

A and B are the bounded features (`kernels/features.py`), c_j the log shift of key j, M_i the largest c_j that query i
sees and M' the largest before the chunk, so every exponent is at most 0, and nothing that a query does not see enters
its numbers, not even in rounding. The query's own shift cancels. There is no epsilon anywhere: a positive map's
denominators are positive. Where all that a query sees would underflow (scores in the hundreds), that row is computed
term by term from log features: exact and slow. Looking both ways is the same with all keys before the first chunk.

Backward, with gn_i = [g_i, -g_i . out_i] / z_i and V_j = [v_j, 1]:  dP_ij = V_j . gn_i. The first sweep handles the
chunk's own square and the past of its queries (S again); the second runs backwards with
R = sum_i exp(M_ref - M_i) A_i gn_i^T over later queries, stable because M never falls.

Registered through `torch.library`, so compiled graphs hold it as one operator.

Legend: b batch, h query heads, g key/value heads, u = h / g, n queries, m keys, c rows and k columns of a chunk's
square, d head dim, e value dim, r features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clearhead.kernels.features import FeatureMap

CHUNK = 128
EXACT_ELEMENTS = 1 << 22  # log features that the term by term rows hold at a time
NONE = -1  # the segment of nothing


@dataclass(frozen=True, eq=False)
class Carry:
    """What keys leave behind for later queries: `total` [b, g, r, e + 1], scaled by exp(-`level`), level [b, g]."""

    total: Tensor
    level: Tensor
    segment: Tensor | None = None  # [b]: whose keys these are, where documents are packed


@dataclass(frozen=True, eq=False)
class Problem:
    """One causal problem: query i sees keys j <= i + offset that are `valid`, and of its own segment."""

    q: Tensor  # [b, g, u, n, d], scaled
    k: Tensor  # [b, g, m, d], scaled
    v1: Tensor  # [b, g, m, e + 1]: the values and a column of ones
    map: FeatureMap
    offset: int
    valid: Tensor | None = None  # [1|b, m] bool
    segments: Tensor | None = None  # [b, m]; then offset is 0 and n = m
    chunk: int = CHUNK

    @property
    def least(self) -> float:
        """A denominator below this has lost terms to underflow."""
        info = torch.finfo(self.q.dtype)
        return self.map.width * 2**20 * info.tiny / info.eps

    def chunks(self) -> list[tuple[int, int]]:
        """Query rows [i0, i1) that see something, in blocks."""
        n = self.q.shape[3]
        first = min(max(0, -self.offset), n)
        return [(i, min(i + self.chunk, n)) for i in range(first, n, self.chunk)]

    def before(self) -> list[tuple[int, int]]:
        """Keys that stand before the first query, in blocks."""
        end = min(max(self.offset, 0), self.k.shape[2])
        return [(j, min(j + self.chunk, end)) for j in range(0, end, self.chunk)]

    def own_keys(self, i0: int, i1: int) -> tuple[int, int]:
        """Keys that stand beside queries i0..i1-1."""
        m = self.k.shape[2]
        return min(i0 + self.offset, m), min(i1 + self.offset, m)

    def queries(self, i0: int, i1: int) -> tuple[Tensor, Tensor]:
        """Scaled queries [b, g, u * c, d] and their features."""
        x = self.q[:, :, :, i0:i1].flatten(2, 3)
        return x, self.map(x)[0]

    def keys(self, j0: int, j1: int) -> tuple[Tensor, Tensor]:
        """Features [b, g, k, r], 0 for hidden keys, and log shifts [b, g, k], -inf for hidden keys."""
        features, level = self.map(self.k[:, :, j0:j1])
        if self.valid is None:
            return features, level
        hidden = ~self.valid[:, None, j0:j1]
        return features.masked_fill(hidden.unsqueeze(-1), 0.0), level.masked_fill(hidden, -math.inf)

    def square(self, i0: int, i1: int, level_bgk: Tensor, j0: int, carry: Carry) -> tuple[Tensor, Tensor, Tensor]:
        """M [b, g, c] (-inf: sees nothing), exp(c_j - M_i) [b, g, c, k], and the factor of what came before [b, g, c].

        Everything here is made row by row from what the row sees.
        """
        i = torch.arange(i0 + self.offset, i1 + self.offset, device=level_bgk.device)
        j = torch.arange(j0, j0 + level_bgk.shape[-1], device=level_bgk.device)
        sees = (j <= i[:, None])[None]  # [1|b, c, k]
        past_bgc = carry.level.unsqueeze(-1).expand(-1, -1, i1 - i0)
        if self.segments is not None and carry.segment is not None:
            own_bc = self.segments[:, i0:i1]
            sees = sees & (own_bc.unsqueeze(-1) == self.segments[:, None, j0 : j0 + len(j)]) & (own_bc >= 0)[..., None]
            past_bgc = past_bgc.masked_fill((own_bc != carry.segment[:, None]).unsqueeze(1), -math.inf)
        own = torch.where(sees.unsqueeze(1), level_bgk.unsqueeze(2), -math.inf)
        top_bgc = past_bgc if not len(j) else torch.maximum(past_bgc, own.amax(dim=-1))
        safe = _finite(top_bgc)
        return top_bgc, own.sub_(safe.unsqueeze(-1)).exp_(), (past_bgc - safe).exp()

    def start(self) -> Carry:
        """Nothing so far."""
        b, g, _, _ = self.k.shape
        return Carry(
            self.k.new_zeros(b, g, self.map.width, self.v1.shape[-1]),
            self.k.new_full((b, g), -math.inf),
            None if self.segments is None else self.segments.new_full((b,), NONE),
        )

    def absorb(self, carry: Carry, features: Tensor, level_bgk: Tensor, j0: int, j1: int) -> Carry:
        """Take up the keys j0..j1-1; of packed documents only the last one stays."""
        held_bg, segment = carry.level, carry.segment
        if self.segments is not None and segment is not None:
            here = self.segments[:, j0:j1]
            last = _last(here, segment)
            level_bgk = level_bgk.masked_fill((here != last[:, None]).unsqueeze(1), -math.inf)
            held_bg = held_bg.masked_fill((last != segment)[:, None], -math.inf)
            segment = last
        top_bg = torch.maximum(held_bg, level_bgk.amax(dim=-1))
        safe = _finite(top_bg)
        scaled = features * (level_bgk - safe.unsqueeze(-1)).exp().unsqueeze(-1)
        total = carry.total * (held_bg - safe).exp()[..., None, None] + scaled.mT @ self.v1[:, :, j0:j1]
        return Carry(total, top_bg, segment)


def _finite(level: Tensor) -> Tensor:
    return level.masked_fill(level == -math.inf, 0.0)


def _last(segments_bk: Tensor, otherwise: Tensor) -> Tensor:
    """The last segment of each row that is not padding, [b]."""
    place = torch.arange(segments_bk.shape[1], device=segments_bk.device).expand_as(segments_bk)
    last = place.masked_fill(segments_bk < 0, NONE).amax(dim=1)
    return torch.where(last < 0, otherwise, segments_bk.gather(1, last.clamp_min(0)[:, None])[:, 0])


# ---- forward ----


def scan(problem: Problem, carry: Carry | None = None) -> tuple[Tensor, Tensor, Carry]:
    """Return out [b, g, u, n, e], z [b, g, u, n] (0: sees nothing, -1: underflow, of a positive map), and what the keys
    leave behind."""
    p = problem
    b, g, u, n, _ = p.q.shape
    out = p.q.new_zeros(b, g, u, n, p.v1.shape[-1] - 1)
    z = p.q.new_zeros(b, g, u, n)
    carry = p.start() if carry is None else carry
    for j0, j1 in p.before():
        carry = p.absorb(carry, *p.keys(j0, j1), j0, j1)
    for i0, i1 in p.chunks():
        j0, j1 = p.own_keys(i0, i1)
        _, a = p.queries(i0, i1)
        features, level = p.keys(j0, j1)
        top, e, past = p.square(i0, i1, level, j0, carry)
        read = _times_rows(a @ carry.total, past, u)
        if j1 > j0:
            weights = _times_rows(a @ features.mT, e, u)
            read = read + weights @ p.v1[:, :, j0:j1]
            carry = p.absorb(carry, features, level, j0, j1)
        read = read.unflatten(2, (u, i1 - i0))
        sees = (top != -math.inf).unsqueeze(2)
        sums = read[..., -1]
        if p.map.positive:
            good = sees & (sums >= p.least)
            z[:, :, :, i0:i1] = torch.where(good, sums, torch.where(sees, -1.0, 0.0))
        else:
            good = sees
            z[:, :, :, i0:i1] = torch.where(sees, sums, 0.0)
        mean = read[..., :-1] / sums.unsqueeze(-1)
        out[:, :, :, i0:i1] = torch.where(good.unsqueeze(-1), mean, 0.0)
    return out, z, carry


def _times_rows(x: Tensor, factor_bgc: Tensor, u: int) -> Tensor:
    """x [b, g, u * c, .] times a factor of its rows [b, g, c] or [b, g, c, .], shared by a key head's u queries."""
    factor = factor_bgc if factor_bgc.dim() == 4 else factor_bgc.unsqueeze(-1)
    return x * (factor if u == 1 else factor.repeat(1, 1, u, 1))


def solve(problem: Problem) -> tuple[Tensor, Tensor]:
    """`scan`, with the rows that underflow computed term by term."""
    out, z, _ = scan(problem)
    for rows, picked in _underflowed(problem, z):
        exact = _exact_weights(problem, rows).sum(dim=-1) @ problem.v1[:, :, None, :, :-1]
        out[:, :, :, rows] = torch.where(picked, exact, out[:, :, :, rows])
    return out, z


def _underflowed(problem: Problem, z: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows with an underflow, a few at a time, and which of their heads [b, g, u, rows, 1]; mostly none."""
    if not problem.map.positive:
        return []
    bad = z == -1.0
    rows = bad.flatten(0, 2).any(dim=0).nonzero().flatten()
    b, g, u = z.shape[:3]
    step = max(1, EXACT_ELEMENTS // max(1, b * g * u * problem.k.shape[2] * problem.map.width))
    return [(part, bad[:, :, :, part].unsqueeze(-1)) for part in rows.split(step) if len(part)]


def _exact_weights(problem: Problem, rows: Tensor) -> Tensor:
    """Each feature's part of the weights, [b, g, u, rows, m, r]; their sum over m and r is 1."""
    p = problem
    log_a = p.map.log(p.q[:, :, :, rows].flatten(2, 3)).unflatten(2, (p.q.shape[2], -1))
    terms = log_a.unsqueeze(4) + p.map.log(p.k)[:, :, None, None]
    keys = torch.arange(p.k.shape[2], device=rows.device)
    sees = (keys <= (rows + p.offset)[:, None])[None]
    if p.valid is not None:
        sees = sees & p.valid[:, None]
    if p.segments is not None:
        sees = sees & (p.segments[:, rows].unsqueeze(-1) == p.segments[:, None])
    terms = terms.masked_fill(~sees[:, None, None, ..., None], -math.inf)
    top = _finite(terms.amax(dim=(-2, -1), keepdim=True))
    powers = (terms - top).exp_()
    return powers / powers.sum(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(powers.dtype).tiny)


# ---- backward ----


def solve_backward(problem: Problem, d_out: Tensor, out: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the scaled queries, scaled keys and values, shaped as in `Problem` (values without the ones)."""
    p = problem
    b, g, u, n, _ = p.q.shape
    good = z != 0.0 if not p.map.positive else z > 0.0
    inverse = torch.where(good, 1.0 / torch.where(good, z, 1.0), 0.0).unsqueeze(-1)
    gn = torch.cat([d_out, -(d_out * out).sum(dim=-1, keepdim=True)], dim=-1) * inverse
    dq, dk, dv = torch.zeros_like(p.q), torch.zeros_like(p.k), torch.zeros_like(p.v1[..., :-1])
    tops = p.q.new_full((b, g, n), -math.inf)

    carry = p.start()
    for j0, j1 in p.before():
        carry = p.absorb(carry, *p.keys(j0, j1), j0, j1)
    for i0, i1 in p.chunks():
        j0, j1 = p.own_keys(i0, i1)
        x, a = p.queries(i0, i1)
        gn_rows = gn[:, :, :, i0:i1].flatten(2, 3)
        features, level = p.keys(j0, j1)
        tops[:, :, i0:i1], e, past = p.square(i0, i1, level, j0, carry)
        da = _times_rows(gn_rows, past, u) @ carry.total.mT
        if j1 > j0:
            v1 = p.v1[:, :, j0:j1]
            d_weights = _times_rows(gn_rows @ v1.mT, e, u)
            weights = _times_rows(a @ features.mT, e, u)
            da = da + d_weights @ features
            dk[:, :, j0:j1] = p.map.gradient(p.k[:, :, j0:j1], features, d_weights.mT @ a)
            dv[:, :, j0:j1] = weights.mT @ gn_rows[..., :-1]
            carry = p.absorb(carry, features, level, j0, j1)
        dq[:, :, :, i0:i1] = p.map.gradient(x, a, da).unflatten(2, (u, -1))

    later = replace(p.start(), level=p.k.new_full((b, g), math.inf))
    for i0, i1 in reversed(p.chunks()):
        j0, j1 = p.own_keys(i0, i1)
        if j1 > j0 and i1 < n:
            _from_later(p, later, j0, j1, dk, dv)
        later = _absorb_queries(p, later, i0, i1, gn, tops)
    for j0, j1 in p.before():
        _from_later(p, later, j0, j1, dk, dv)
    _exact_backward(p, d_out, z, dq, dk, dv)
    return dq, dk, dv


def _absorb_queries(p: Problem, later: Carry, i0: int, i1: int, gn: Tensor, tops: Tensor) -> Carry:
    """Take up the queries i0..i1-1, which stand before those taken up; of packed documents only the first one stays."""
    u, level_bgc, held_bg, segment = p.q.shape[2], tops[:, :, i0:i1], later.level, later.segment
    level_bgc = level_bgc.masked_fill(level_bgc == -math.inf, math.inf)  # sees nothing: gn is 0
    if p.segments is not None and segment is not None:
        here = p.segments[:, i0:i1]
        first = _last(here.flip(1), segment)
        level_bgc = level_bgc.masked_fill((here != first[:, None]).unsqueeze(1), math.inf)
        held_bg = held_bg.masked_fill((first != segment)[:, None], math.inf)
        segment = first
    low_bg = torch.minimum(held_bg, level_bgc.amin(dim=-1))
    safe = low_bg.masked_fill(low_bg == math.inf, 0.0)
    _, a = p.queries(i0, i1)
    scaled = _times_rows(a, (safe.unsqueeze(-1) - level_bgc).exp(), u)
    total = later.total * (safe - held_bg).exp()[..., None, None] + scaled.mT @ gn[:, :, :, i0:i1].flatten(2, 3)
    return Carry(total, low_bg, segment)


def _from_later(p: Problem, later: Carry, j0: int, j1: int, dk: Tensor, dv: Tensor) -> None:
    """Add to the keys j0..j1-1 what later queries make of them."""
    features, level_bgk = p.keys(j0, j1)
    if p.segments is not None and later.segment is not None:
        level_bgk = level_bgk.masked_fill((p.segments[:, j0:j1] != later.segment[:, None]).unsqueeze(1), -math.inf)
    factor = (level_bgk - later.level.unsqueeze(-1)).exp().unsqueeze(-1)  # level = inf: no later query sees anything
    d_features = p.v1[:, :, j0:j1] @ later.total.mT * factor
    dk[:, :, j0:j1] += p.map.gradient(p.k[:, :, j0:j1], features, d_features)
    dv[:, :, j0:j1] += (features * factor @ later.total)[..., :-1]


def _exact_backward(p: Problem, d_out: Tensor, z: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    for rows, picked in _underflowed(p, z):
        w = _exact_weights(p, rows)
        g_rows = torch.where(picked, d_out[:, :, :, rows], 0.0)
        v = p.v1[:, :, None, :, :-1]
        d_terms = g_rows @ v.mT  # [b, g, u, rows, m]
        weights = w.sum(dim=-1)
        d_terms = w * (d_terms - (d_terms * weights).sum(dim=-1, keepdim=True)).unsqueeze(-1)
        dv += (weights.mT @ g_rows).sum(dim=2)
        ones = torch.ones((), dtype=w.dtype, device=w.device)
        d_queries = d_terms.sum(dim=4)
        dq[:, :, :, rows] += p.map.gradient(p.q[:, :, :, rows].flatten(2, 3), ones, d_queries.flatten(2, 3)).unflatten(
            2, (p.q.shape[2], -1)
        )
        dk += p.map.gradient(p.k, ones, d_terms.sum(dim=(2, 3)))
