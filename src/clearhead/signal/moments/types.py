"""The quantities of the theory. Imports no torch.

Two kinds of token correlation exist and differ as soon as the mean is not 0 (after ReLU, say): *centred*, about the
mean, and *raw*, about 0. A following linear map sees the raw one. They have different names everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Moments:
    """Moments of an activation [sequence, token, feature], over inputs and weights.

    mean        E x
    variance    E (x - mean)^2
    covariance  E (x_t - mean)(x_s - mean) for the same feature at two different tokens t, s of one sequence
    """

    mean: float
    variance: float
    covariance: float

    @classmethod
    def of(cls, variance: float, correlation: float, mean: float = 0.0) -> Moments:
        """Moments from the centred correlation in place of the covariance."""
        return cls(mean, variance, correlation * variance)

    @property
    def correlation(self) -> float:
        """Centred token correlation: covariance / variance; 0 for a constant."""
        return self.covariance / self.variance if self.variance != 0.0 else 0.0

    @property
    def second_moment(self) -> float:
        """E x^2."""
        return self.variance + self.mean**2

    @property
    def raw_covariance(self) -> float:
        """E x_t x_s at two different tokens."""
        return self.covariance + self.mean**2

    @property
    def raw_correlation(self) -> float:
        """Raw token correlation: E x_t x_s / E x^2; 0 where everything is 0."""
        return self.raw_covariance / self.second_moment if self.second_moment != 0.0 else 0.0


@dataclass(frozen=True)
class GradientMoments:
    """Moments of the gradient of the loss by an activation. Its mean is taken as 0, so raw and centred coincide.

    variance    E g^2
    covariance  E g_t g_s for the same feature at two different tokens of one sequence
    """

    variance: float
    covariance: float

    @classmethod
    def of(cls, variance: float, correlation: float) -> GradientMoments:
        """Moments from the correlation in place of the covariance."""
        return cls(variance, correlation * variance)

    @property
    def correlation(self) -> float:
        """Token correlation: covariance / variance; 0 for a vanished gradient."""
        return self.covariance / self.variance if self.variance != 0.0 else 0.0

    def __add__(self, other: GradientMoments) -> GradientMoments:
        """The gradient where two uncorrelated paths meet."""
        return GradientMoments(self.variance + other.variance, self.covariance + other.covariance)

    def scaled(self, factor: float) -> GradientMoments:
        """The gradient times a constant whose square is `factor`."""
        return GradientMoments(self.variance * factor, self.covariance * factor)
