"""What an inspection ends in: findings with evidence, and advice that the theory has checked. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clearhead.signal.trace import Trace

KINDS = {
    "exploding_signal": "the residual stream grows out of proportion",
    "vanishing_gradient": "the gradient dies on its way to the first layers",
    "exploding_gradient": "the gradient grows on its way to the first layers",
    "update_amplification": "a small update of the weights changes the output too much",
    "rank_collapse": "the tokens become copies of one another",
    "attention_saturation": "softmax gives nearly everything to one key and passes no gradient",
    "silent_branches": "the branches of deep layers add almost nothing to the stream",
    "dead_matrix": "a matrix gets almost no gradient",
    "not_finite": "infinite or undefined values",
    "off_theory": "measured and predicted disagree",
}
"""Every kind of finding, in words."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or would be."""

    kind: str
    """A key of `KINDS`."""
    severity: str
    """untrainable: a run is not expected to learn | harmful: it learns worse than it could | note."""
    stack: str
    """decoder | encoder."""
    depth: int | None
    """Layer at which it sets in, counted from 0 in the order of the computation; None = the whole stack."""
    source: str
    """predicted | measured | both."""
    value: float
    threshold: float
    evidence: str
    """One sentence with the numbers."""


@dataclass(frozen=True)
class Advice:
    """A remedy for some findings, with what the theory says of the model after it."""

    title: str
    cures: tuple[str, ...]
    """Kinds of findings that the theory no longer shows after it."""
    leaves: tuple[str, ...]
    """Kinds that it still shows."""
    line: str
    """The one line of Python that does it."""
    overrides: Mapping[str, Any]
    """The same as fields of `ModelConfig`."""
    reason: str
    """Why it helps, in one or two sentences."""
    predicted: Trace
    """The theory's trace after it."""
    verdict: str = "trainable"
    """trainable | untrainable: what the theory expects of a plain training run after it."""
    command: str | None = None
    """The shell command that compares before with after; None where there is none (a Hugging Face model)."""


@dataclass(frozen=True)
class Report:
    """Prediction beside measurement, findings and advice: what `clearhead.signal.inspect` returns."""

    title: str
    predicted: Trace
    measured: Trace | None
    findings: tuple[Finding, ...]
    advice: tuple[Advice, ...]
    verdict: str
    """trainable | untrainable: what the theory expects of a plain training run. Of weights that are not a random
    start's: trained (it predicts better than token frequencies do) | no forecast."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Of the model and the data: family, layers, width, parameters, tokens, batch, loss ..."""

    def __str__(self) -> str:
        """The terminal's table, as text without colour."""
        from clearhead.signal.console import as_text

        return as_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)
