"""Self-Adjust Softmax (arXiv 2502.18277) as weights: r(z) softmax(z), by averages over sampled scores. Imports no
torch.

The weights depend on the row's extrema and on what all keys share, and do not sum to 1, so no integral of
`laplace.py` fits. Instead a few dozen rows of scores with the right variance, shared part, norms and angles are drawn
(fixed seed, so that the answer is a function of its inputs), and every mean that the flow needs is taken over them:
of the weights w, and of dz, the gradient by the scores, for h_ij independent over keys and for h_ij = 1. Both are
exact formulas of `attention/self_adjust.py`; only the averages have sampling noise (some per cent). Inputs are
rounded by about 2 % so that layers which resemble each other share one average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from clearhead.attention.spec import SelfAdjust
from clearhead.signal.moments.attention_means import row_means
from clearhead.signal.moments.flow import Flow, ScoreResponse, Setting
from clearhead.signal.moments.laplace import Array
from clearhead.signal.moments.mean_read import statistics
from clearhead.signal.moments.types import Moments

QUERIES = 32
"""Rows drawn together, on the same keys."""
ELEMENTS = 1 << 17
"""Scores drawn for one average, at least; more for very long rows."""
EPS = 1e-10


@dataclass(frozen=True)
class Rows:
    """What is drawn, rounded."""

    form: str
    detach: bool
    spread: float
    shared: float
    """Deviation of what the scores of a row share."""
    freedom: int
    cosine: float
    keys: int
    causal: bool
    window: int | None


@dataclass(frozen=True)
class Averages:
    """Means over rows, and over pairs of rows (`_pair`). Suffix `_own`: for h independent over keys, of unit variance;
    `_flat`: for h = 1. `_q`: weighted by |q|^2 or by q . q'.
    """

    squares: float
    sum_square: float
    pull: float
    overlap: float
    sum_overlap: float
    coherent: float
    dz_own: float
    dz_flat: float
    dz_own_q: float
    dz_flat_q: float
    sums_own: float
    sums_flat: float
    sums_own_q: float
    sums_flat_q: float
    trace: float
    """E (sum_j dz_j h_j)^2 for h independent over keys."""
    trace_q: float
    toward_own: float
    toward_flat: float
    toward_own_pair: float
    """Of two rows, times the cosine of their directions."""
    toward_flat_pair: float
    dz_own_pair: float
    dz_flat_pair: float
    dz_own_pair_q: float
    dz_flat_pair_q: float
    sums_own_pair: float
    sums_flat_pair: float
    sums_own_pair_q: float
    sums_flat_pair_q: float
    trace_pair: float


def self_adjust_read(s: Setting, choice: SelfAdjust) -> Flow:
    """The flow of (r(scores) softmax(scores)) V, for the four forms, with or without gradients through the extrema."""
    z, value, d = s.scores, s.shape.value, s.shape.value.fan_in
    cosine = z.query_correlation * float(np.mean(z.turns))
    m = _averages(
        Rows(
            choice.form,
            choice.detach_extrema or choice.form == "product",
            _rounded(math.sqrt(z.variance)),
            _rounded(math.sqrt(z.shared_variance)) if choice.form in ("product", "range") else 0.0,
            int(min(max(round(z.freedom), 2), 128)),
            round(cosine * 64.0) / 64.0,
            s.keys,
            s.table.causal,
            s.table.window,
        )
    )
    shared, own = s.value_parts
    p, lean = s.dropout, s.leaning
    squares, sum_square = m.squares / (1.0 - p), m.sum_square + m.squares * p / (1.0 - p)
    variance = shared * sum_square + own * squares + lean * (m.pull - m.squares) / d
    covariance = shared * m.sum_overlap + own * m.overlap + lean * m.coherent / d
    gain, bias = d * value.variance, value.bias_variance
    return Flow(
        mix=Moments(0.0, gain * variance + bias * sum_square, gain * covariance + bias * m.sum_overlap),
        stats=statistics(s, row_means(s.table, z)),
        squares=squares,
        overlap=m.overlap,
        sum_square=sum_square,
        sum_overlap=m.sum_overlap,
        mixed_variance=d * variance,
        mixed_covariance=d * covariance,
        response=_response(s, m),
        notes=_notes(s, choice),
    )


def _notes(s: Setting, choice: SelfAdjust) -> tuple[str, ...]:
    notes = ["self_adjust: means over sampled rows of scores; entropy and weights are those of its softmax factor"]
    if choice.form == "range" and choice.detach_extrema and s.table.causal:
        # A row of one key has weight x/x: its derivative at fixed extrema is 1/x, whose square has no mean.
        notes.append("self_adjust: with detached extrema a row of one key has a gradient of infinite variance")
    return tuple(notes)


def _response(s: Setting, m: Averages) -> ScoreResponse:
    shared, own = s.value_parts
    value, p = s.shape.value, s.dropout
    unit = s.shape.head_dim * value.fan_in * value.variance
    flat = unit * shared + s.shape.head_dim * value.bias_variance
    own_h, common = unit * own, unit * s.leaning
    noisy = (own_h + p * flat) / (1.0 - p)
    rho = s.x.raw_correlation
    pair = own_h * m.dz_own_pair + flat * m.dz_flat_pair
    toward_pair = own_h * m.toward_own_pair + flat * m.toward_flat_pair
    pair_q = own_h * m.dz_own_pair_q + flat * m.dz_flat_pair_q
    return ScoreResponse(
        row=noisy * m.dz_own + flat * m.dz_flat,
        row_query=noisy * m.dz_own_q + flat * m.dz_flat_q,
        along=common * m.trace,
        along_weighted=common * m.trace_q,
        toward=noisy * m.toward_own + flat * m.toward_flat,
        pair=pair,
        pair_key=pair_q,
        pair_query=pair_q,
        pair_input=pair * rho,
        pair_along=common * m.trace_pair,
        pair_along_query=(common * m.trace_pair + toward_pair) * s.scores.query_correlation,
        pair_toward=toward_pair,
        sums=noisy * m.sums_own + flat * m.sums_flat,
        sums_query=noisy * m.sums_own_q + flat * m.sums_flat_q,
        sums_pair=own_h * m.sums_own_pair + flat * m.sums_flat_pair,
        sums_pair_key=own_h * m.sums_own_pair_q + flat * m.sums_flat_pair_q,
    )


def _rounded(deviation: float) -> float:
    """To steps of 2 %."""
    return math.exp(round(math.log(deviation) * 50.0) / 50.0) if deviation > 1e-6 else 0.0


@lru_cache(maxsize=4096)
def _averages(r: Rows) -> Averages:
    """Draw groups of queries on common keys, and average. Letters: g groups, i queries, j keys, f dimensions."""
    groups = max(4, ELEMENTS // (QUERIES * r.keys))
    rng = np.random.default_rng(20240)
    u_gjf = rng.standard_normal((groups, r.keys, r.freedom))
    common_g1f = rng.standard_normal((groups, 1, r.freedom))
    apart_gif = rng.standard_normal((groups, QUERIES, r.freedom))
    h_gj = rng.standard_normal((groups, r.keys))
    offset_gf = rng.standard_normal((groups, r.freedom))
    cosine = max(r.cosine, 0.0)
    p_gif = (math.sqrt(cosine) * common_g1f + math.sqrt(1.0 - cosine) * apart_gif) / math.sqrt(r.freedom)
    p_gif /= math.sqrt((p_gif**2).sum(-1).mean())  # what is known exactly is set exactly
    norm_gi = np.sqrt((p_gif**2).sum(-1))
    u_gij = np.einsum("gif,gjf->gij", p_gif, u_gjf) / norm_gi[..., None]
    shift_gi = np.einsum("gif,gf->gi", p_gif, offset_gf)
    shift_gi *= r.shared / math.sqrt((shift_gi**2).mean())
    z_gij = r.spread * norm_gi[..., None] * u_gij + shift_gi[..., None]
    visible_ij = _visible(r)
    scores = _Scores(r, z_gij, visible_ij)
    w = scores.weights
    own, flat = scores.backward(h_gj[:, None, :]), scores.backward(np.ones((1, 1, 1)))
    q2 = norm_gi**2
    dot = np.einsum("gif,gkf->gik", p_gif, p_gif)
    mean_dot = (dot.sum() - q2.sum()) / (groups * QUERIES * (QUERIES - 1))
    dot += cosine - mean_dot
    pull = (w * u_gij).sum(-1)
    trace = (own * h_gj[:, None, :]).sum(-1)
    dz = {"own": own, "flat": flat}

    def rows(values_gi: Array) -> float:
        return float(values_gi.mean())

    def pairs(a_gij: Array, weights_gik: Array | None = None) -> float:
        """Mean over pairs of different rows of sum_j a_ij a_kj, weighted."""
        products = np.einsum("gij,gkj->gik", a_gij, a_gij)
        products = products if weights_gik is None else products * weights_gik
        diagonal = np.einsum("gii->g", products).sum()
        return float((products.sum() - diagonal) / (groups * QUERIES * (QUERIES - 1)))

    unit = dot / (norm_gi[:, :, None] * norm_gi[:, None, :])
    sums = {name: value.sum(-1) for name, value in dz.items()}
    toward = {name: (value * u_gij).sum(-1) for name, value in dz.items()}
    return Averages(
        squares=rows((w * w).sum(-1)),
        sum_square=rows(w.sum(-1) ** 2),
        pull=rows(pull**2),
        overlap=pairs(w),
        sum_overlap=pairs(w.sum(-1, keepdims=True)),
        coherent=pairs(pull[..., None], unit),
        **{f"dz_{name}": rows((v * v).sum(-1)) for name, v in dz.items()},
        **{f"dz_{name}_q": rows((v * v).sum(-1) * q2) for name, v in dz.items()},
        **{f"sums_{name}": rows(v**2) for name, v in sums.items()},
        **{f"sums_{name}_q": rows(v**2 * q2) for name, v in sums.items()},
        trace=rows(trace**2),
        trace_q=rows(trace**2 * q2),
        **{f"toward_{name}": rows(v**2) for name, v in toward.items()},
        **{f"toward_{name}_pair": pairs(v[..., None], unit) for name, v in toward.items()},
        **{f"dz_{name}_pair": pairs(v) for name, v in dz.items()},
        **{f"dz_{name}_pair_q": pairs(v, dot) for name, v in dz.items()},
        **{f"sums_{name}_pair": pairs(v[..., None]) for name, v in sums.items()},
        **{f"sums_{name}_pair_q": pairs(v[..., None], dot) for name, v in sums.items()},
        trace_pair=pairs(trace[..., None]),
    )


def _visible(r: Rows) -> Array | None:
    if not r.causal and r.window is None:
        return None
    row = np.floor((np.arange(QUERIES) + 0.5) / QUERIES * r.keys)[:, None]
    key = np.arange(r.keys)
    if r.window is None:
        return np.asarray(key <= row)
    side = r.window - 1 if r.causal else (r.window - 1) // 2
    return np.asarray((key >= row - side) & (key <= (row if r.causal else row + side)))


class _Scores:
    """Weights and their transposed Jacobian for one form; the formulas stand in `attention/self_adjust.py`."""

    def __init__(self, r: Rows, z: Array, visible: Array | None) -> None:
        seen = np.ones(z.shape[-2:], dtype=bool) if visible is None else visible
        low = np.where(seen, z, np.inf).min(-1, keepdims=True)
        high = np.where(seen, z, -np.inf).max(-1, keepdims=True)
        e = np.exp(np.where(seen, z - high, -np.inf))
        self.softmax = e / e.sum(-1, keepdims=True)
        self.at_low = self.at_high = np.zeros(1)
        self.denominator: Array = np.ones(1)
        if not r.detach:
            self.at_low, self.at_high = (z == low) & seen, (z == high) & seen
        if r.form == "range":
            self.at_low, self.at_high = self.at_low * (low < 0.0), self.at_high * (high > 0.0)
            low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
        if r.form in ("range", "minmax"):
            self.denominator = high - low + EPS
        self.normalised = r.form in ("range", "minmax")
        self.above = z if r.form == "product" else z - low
        self.weights = self.softmax * self.above / self.denominator

    def backward(self, h: Array) -> Array:
        """The gradient by the scores for the gradient `h` by the weights."""
        delta = (h * self.weights).sum(-1, keepdims=True)
        dz = self.softmax * (h * (self.above + 1.0) / self.denominator - delta)
        pull = (self.softmax * h).sum(-1, keepdims=True)
        if self.normalised:
            return np.asarray(
                dz + self.at_low * ((delta - pull) / self.denominator) - self.at_high * (delta / self.denominator)
            )
        return np.asarray(dz - self.at_low * pull)
