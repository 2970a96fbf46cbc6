"""Gradients of a causal stack, token by token. Imports no torch.

In a causal stack the first tokens are read by every query, so gradient piles up on them with depth, and two numbers for
all tokens (variance, covariance) no longer close the recursion: the pile is counted as a correlation that it is not.
Here the gradient is a variance for each token and a covariance for each pair. Long sequences are taken in groups of
neighbouring tokens that share their numbers.

Derived by us (docs/signal.md). With weights a_ij of row i over its n_i keys, E a_ij = 1/n_i, P_i = E sum_j a_ij^2:

    E a_ij^2 = P_i / n_i        E a_ij a_ij' = (1 - P_i) / (n_i (n_i - 1))        E a_ij a_i'j' ~ 1 / (n_i n_i')

    V'_j   = sum_{i >= j} V_i P_i / n_i + (1 + kappa) sum_{i != i' >= j} C_ii' / (n_i n_i')
    C'_jj' = sum_{i >= j, j'} V_i (1 - P_i) / (n_i (n_i - 1)) + sum_{i >= j, i' >= j', i != i'} C_ii' / (n_i n_i')

kappa is how much more two rows overlap than flat ones. The first rows average over few keys, so their mix is larger;
the stream's variance by token follows from that (`Profile`), and a norm divides a token's gradient by its own.
Approximate: P_i = 1/n_i + h (n_i - 1)/n_i^2 with h set by the mean P, and token correlations are equal for all pairs.

Legend: arrays by group of tokens, [a] or [a, b].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from clearhead.signal.moments.types import GradientMoments

Array = npt.NDArray[np.float64]

ONE = GradientMoments(1.0, 1.0)

GROUPS = 64
"""Most groups that are kept; up to so many tokens nothing is approximated by grouping."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Tokens 0 .. T-1 in groups of neighbours."""

    size_a: Array
    seen_a: Array
    """Keys that a group's middle query sees."""
    reads_ab: Array
    """Share of the pairs (token j of a, query i of b) with i >= j."""

    @cached_property
    def tokens(self) -> float:
        """T."""
        return float(self.size_a.sum())

    @cached_property
    def pairs_ab(self) -> Array:
        """Pairs of different tokens, as a share of all T (T - 1)."""
        pairs_ab = np.outer(self.size_a, self.size_a) - np.diag(self.size_a)
        return pairs_ab / max(self.tokens * (self.tokens - 1.0), 1.0)

    @cached_property
    def seen_ab(self) -> Array:
        """n_a n_b."""
        return np.outer(self.seen_a, self.seen_a)

    @cached_property
    def wide_ab(self) -> Array:
        """`reads_ab` summed over the queries of a group."""
        return self.reads_ab * self.size_a

    @cached_property
    def reads2_ab(self) -> Array:
        """`reads_ab` squared."""
        return self.reads_ab**2

    @cached_property
    def flat(self) -> float:
        """Mean of 1/n over rows: E sum_j a_j^2 of equal weights."""
        return float(self.size_a @ (1.0 / self.seen_a)) / self.tokens

    @cached_property
    def bend_a(self) -> Array:
        """(n - 1) / n^2."""
        return (self.seen_a - 1.0) / self.seen_a**2

    @cached_property
    def flat_overlap(self) -> float:
        """Mean of 1 / max(n, n') over pairs of different causal rows: 2 (T - H_T) / (T (T - 1))."""
        tokens = int(self.tokens)
        if tokens < 2:
            return 1.0
        harmonic = float((1.0 / np.arange(1, tokens + 1)).sum())
        return 2.0 * (tokens - harmonic) / (tokens * (tokens - 1.0))


@lru_cache(maxsize=64)
def groups_of(tokens: int) -> Groups:
    """Single tokens at the front, where a causal row changes fastest, wider groups behind; at most `GROUPS`."""
    if tokens <= GROUPS:
        edges = np.arange(tokens + 1)
    else:
        front = np.arange(GROUPS // 4)
        edges = np.unique(
            np.concatenate([front, np.round(np.geomspace(GROUPS // 4, tokens, GROUPS - len(front) + 1))])
        ).astype(int)
    size = np.diff(edges).astype(float)
    seen = edges[:-1] + (size + 1.0) / 2.0
    reads = np.triu(np.ones((len(size), len(size))), 1)
    np.fill_diagonal(reads, (size + 1.0) / (2.0 * size))
    return Groups(size, seen, reads)


def row_squares(groups: Groups, mean: float) -> Array:
    """E sum_j a_j^2 by row, [a], of softmax without dropout whose mean over rows is `mean`."""
    bend = float(groups.size_a @ groups.bend_a) / groups.tokens
    h = max(mean - groups.flat, 0.0) / bend if bend > 0.0 else 0.0
    return np.minimum(1.0, 1.0 / groups.seen_a + h * groups.bend_a)


@dataclass(frozen=True, eq=False)
class Profile:
    """The variance of an activation by token, over its mean."""

    groups: Groups
    share_a: Array

    @classmethod
    def even(cls, tokens: int) -> Profile:
        """The same at every token."""
        groups = groups_of(tokens)
        return cls(groups, np.ones_like(groups.size_a))

    @classmethod
    def of_mix(cls, tokens: int, *, shared: float, own: float, squares: float) -> Profile:
        """Of a causal mix, shared + own P_i: what tokens share stays, what is their own is averaged."""
        groups = groups_of(tokens)
        return cls(groups, shared + own * row_squares(groups, squares)).scaled()

    def scaled(self) -> Profile:
        """With a mean of 1."""
        mean = float(self.groups.size_a @ self.share_a) / self.groups.tokens
        return Profile(self.groups, self.share_a / mean) if mean > 0.0 else Profile.even(int(self.groups.tokens))

    def mixed(self, weight: float, other: Profile, other_weight: float) -> Profile:
        """Of a sum of two uncorrelated activations with these variances."""
        return Profile(self.groups, weight * self.share_a + other_weight * other.share_a).scaled()


@dataclass(frozen=True, eq=False)
class PositionGradient:
    """Gradient moments by token: V_a = E g^2 of a token of group a, C_ab = E g_t g_s of two different tokens.

    Kept as two arrays and a factor on each, so that what multiplies all tokens alike touches no array.
    """

    groups: Groups
    bare_a: Array
    bare_ab: Array
    gain: GradientMoments = ONE
    """V = gain.variance * bare_a, C = gain.covariance * bare_ab."""
    known: GradientMoments | None = None
    """The means, where they follow from those of what this was made of."""

    @classmethod
    def even(cls, tokens: int, g: GradientMoments) -> PositionGradient:
        """The same at every token."""
        groups = groups_of(tokens)
        count = len(groups.size_a)
        return cls(groups, np.full(count, g.variance), np.full((count, count), g.covariance))

    @cached_property
    def variance_a(self) -> Array:
        """V."""
        return self.bare_a * self.gain.variance

    @cached_property
    def covariance_ab(self) -> Array:
        """C."""
        return self.bare_ab * self.gain.covariance

    @cached_property
    def moments(self) -> GradientMoments:
        """Means over tokens and over pairs of different tokens."""
        if self.known is not None:
            return self.known
        groups, gain = self.groups, self.gain
        variance = float(groups.size_a @ self.bare_a) / groups.tokens
        covariance = float(np.vdot(groups.pairs_ab, self.bare_ab))
        return GradientMoments(variance * gain.variance, covariance * gain.covariance)

    def through(self, backward: Callable[[GradientMoments], GradientMoments]) -> PositionGradient:
        """Behind a map that acts on each token alone: its gains on variance and covariance, at every token."""
        return self.times(backward(ONE))

    def times(self, by: GradientMoments) -> PositionGradient:
        """With variances and covariances multiplied."""
        gain, mean = self.gain, self.moments
        return PositionGradient(
            self.groups,
            self.bare_a,
            self.bare_ab,
            GradientMoments(gain.variance * by.variance, gain.covariance * by.covariance),
            GradientMoments(mean.variance * by.variance, mean.covariance * by.covariance),
        )

    def divided(self, profile: Profile) -> PositionGradient:
        """Behind a norm whose input has this profile: its own variance at each token, not the mean, divides."""
        root = np.sqrt(profile.share_a)
        return PositionGradient(
            self.groups, self.bare_a / profile.share_a, self.bare_ab / (root[:, None] * root), self.gain
        )

    def __add__(self, other: PositionGradient) -> PositionGradient:
        return PositionGradient(
            self.groups,
            self.variance_a + other.variance_a,
            self.covariance_ab + other.covariance_ab,
            known=self.moments + other.moments,
        )

    def plus(self, g: GradientMoments, shape: PositionGradient) -> PositionGradient:
        """With `g` added: its variance spread over the tokens as in `shape`, its covariance evenly."""
        return PositionGradient(
            self.groups,
            self.variance_a + shape._spread_a * g.variance,
            self.covariance_ab + g.covariance,
            known=self.moments + g,
        )

    def shaped(self, g: GradientMoments) -> PositionGradient:
        """`g` on the mean, its variance spread over the tokens as here, its covariance evenly."""
        return PositionGradient(
            self.groups, self._spread_a * g.variance, np.full_like(self.bare_ab, g.covariance), known=g
        )

    @cached_property
    def _spread_a(self) -> Array:
        """The variance by token, over its mean."""
        mean = self.moments.variance
        return self.variance_a / mean if mean > 0.0 else np.ones_like(self.bare_a)

    def through_values(
        self, *, squares: float, overlap: float, dropped: float = 0.0, sum_square: float = 1.0, sum_overlap: float = 1.0
    ) -> PositionGradient:
        """Behind a causal mix: the gradient by the values, from this one by their weighted sums.

        Args, all means over rows or over pairs of rows:
            squares: E sum_j a_j^2, dropout included.
            overlap: E sum_j a_j b_j of two different rows.
            dropped: dropout on the weights.
            sum_square, sum_overlap: E of the square of a row's sum, dropout included, and of the product of two rows'
                sums; 1 for softmax without dropout.
        """
        groups = self.groups
        size, seen, reads = groups.size_a, groups.seen_a, groups.reads_ab
        noise = 1.0 / (1.0 - dropped)
        kept = squares / noise / sum_overlap
        bare_a = row_squares(groups, kept)
        row_sum = sum_square / (1.0 + (noise - 1.0) * kept)
        squares_a = row_sum * noise * bare_a
        others_a = np.maximum(row_sum * (1.0 + (noise - 1.0) * bare_a) - squares_a, 0.0)

        wide_ab = groups.wide_ab
        scaled_ab = self.covariance_ab / groups.seen_ab
        own_a = np.divide(
            size * self.variance_a * others_a, seen * (seen - 1.0), out=np.zeros_like(seen), where=seen > 1.0
        )
        # A query is not a pair with itself: its own covariance is taken out again, beside what its row brings alone.
        itself_a = size * np.diag(scaled_ab)
        pairs_ab = wide_ab @ scaled_ab @ wide_ab.T
        variance_a = wide_ab @ (self.variance_a * squares_a / seen)
        variance_a += overlap / groups.flat_overlap * (np.diag(pairs_ab) - groups.reads2_ab @ itself_a)
        covariance_ab = sum_overlap * pairs_ab
        covariance_ab += (reads * (own_a - sum_overlap * itself_a)) @ reads.T
        return PositionGradient(groups, variance_a, covariance_ab)
