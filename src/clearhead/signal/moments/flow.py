"""What one attention does to values and to scores: the seam between the forward pass, each family of weights and
reads, and the backward pass. Imports no torch.

A family (`mean_read.py`, `laser_read.py`, `self_adjust_read.py`) answers a `Flow` for given inputs and scores;
forward and backward are then the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass

from clearhead.signal.moments.rows import RowTable
from clearhead.signal.moments.scores import Scores, TemperatureMoments
from clearhead.signal.moments.types import Moments
from clearhead.signal.skeleton import AttentionShape
from clearhead.signal.trace import AttentionStats


@dataclass(frozen=True, eq=False)
class Setting:
    """An attention with its inputs, as the families read it."""

    x: Moments
    """Makes the queries."""
    y: Moments
    """Makes keys and values."""
    shape: AttentionShape
    queries: int
    keys: int
    dropout: float
    """On the weights, 0 when not training."""
    temperature: TemperatureMoments
    scores: Scores
    table: RowTable

    @property
    def own(self) -> float:
        """What tokens of y do not share."""
        return max(self.y.variance - self.y.covariance, 0.0)

    @property
    def value_parts(self) -> tuple[float, float]:
        """(shared, own) second moments per feature of what the values are made of, value temperature included."""
        mean2 = self.temperature.value_mean**2
        shared = mean2 * self.y.raw_covariance
        return shared, max((mean2 + self.temperature.value_variance) * self.y.second_moment - shared, 0.0)

    @property
    def leaning(self) -> float:
        """Of the values' own variance, the part that the scores see as well (rotary positions turn some of it away)."""
        return self.temperature.value_mean**2 * self.own * self.scores.own_share * self.scores.key_turn


@dataclass(frozen=True)
class ScoreResponse:
    """Sizes of dz, the gradient by the scores, and of D_i = sum_j dz_ij own_j, for one head and a unit gradient
    variance at the mix. D_i is counted in units of the keys' own part, per dimension.

    Those of two different rows are for a gradient of token correlation 1.
    """

    row: float
    """E sum_j dz_ij^2."""
    row_query: float
    """The same weighted by |q|^2."""
    along: float
    """What D_i has besides, along the direction in which the gradient reads the values."""
    along_weighted: float
    """The same weighted by |q|^2."""
    toward: float
    """E of D_i's square along the query's direction."""
    pair: float
    """E sum_j dz_ij dz_i'j of two rows."""
    pair_key: float
    """The same weighted by p . p', p the direction that makes the scores."""
    pair_query: float
    """The same weighted by q . q'."""
    pair_input: float
    """The same weighted by cos(x, x')."""
    pair_along: float
    pair_along_query: float
    """Weighted by q . q'."""
    pair_toward: float
    sums: float = 0.0
    """E (sum_j dz_ij)^2; 0 where weights do not react to a shift of the scores."""
    sums_query: float = 0.0
    sums_pair: float = 0.0
    sums_pair_key: float = 0.0


@dataclass(frozen=True)
class Flow:
    """The answer of a family."""

    mix: Moments
    """The heads' weighted values, of all tokens."""
    stats: AttentionStats
    squares: float
    """E sum_j (dout_i / dv_j)^2 of a row, with dropout."""
    overlap: float
    """E sum_j (dout_i / dv_j)(dout_i' / dv_j) of two rows."""
    sum_square: float
    """E (sum_j dout_i / dv_j)^2, with dropout."""
    sum_overlap: float
    """The same of two rows."""
    mixed_variance: float
    """E of the square of sum_j (dout_i / dv_j) y_j, per feature of y: what the gradient of W_v meets."""
    mixed_covariance: float
    response: ScoreResponse
    notes: tuple[str, ...] = ()
