"""What hypothesis may draw: moments that a variable can have."""

from __future__ import annotations

from hypothesis import strategies as st

from clearhead.signal.moments.types import GradientMoments, Moments

VARIANCES = st.floats(1e-6, 1e4)
CORRELATIONS = st.floats(0.0, 1.0)
ANY_CORRELATIONS = st.floats(-1.0, 1.0)
MEANS = st.floats(-20.0, 20.0)
PROBABILITIES = st.floats(0.0, 0.95)

MOMENTS = st.builds(Moments.of, VARIANCES, CORRELATIONS, MEANS)
CENTRED = st.builds(Moments.of, VARIANCES, CORRELATIONS)
GRADIENTS = st.builds(GradientMoments.of, VARIANCES, CORRELATIONS)
