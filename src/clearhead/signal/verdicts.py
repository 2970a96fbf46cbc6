"""Read a trace: what is wrong with this model, where it sets in, and whether a plain run is expected to learn.

The thresholds stand here and nowhere else. They were set on runs of experiments/trainability that are not part of its
grid, and then checked on the grid. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from clearhead.signal.findings import Finding
from clearhead.signal.moments.dropout import dropout
from clearhead.signal.skeleton import Skeleton
from clearhead.signal.trace import Tap, Trace
from clearhead.signal.words import number


@dataclass(frozen=True)
class Thresholds:
    """Where a quantity counts as a fault. `harmful` hurts, `untrainable` stops a run from learning."""

    distinct_harmful: float = 0.05
    """1 - token correlation of a stack's output: what is left to tell tokens apart."""
    distinct_untrainable: float = 0.005
    amplification_harmful: float = 5.5
    """Sum over the residual branches of their share in the sum they enter (Admin's sum of beta_ii^2): how much a small
    relative change of every weight changes the output."""
    amplification_untrainable: float = 7.5
    gradient_ratio_harmful: float = 1e3
    """Variance of the gradient at the stream's one end over that at its other end, behind the first norm."""
    gradient_ratio_untrainable: float = 1e8
    stream_growth_harmful: float = 100.0
    """Variance of the stream at its end over that behind the first layer."""
    silent_share: float = 0.2
    """Mean share of the last quarter's branches, times the number of branches."""
    saturation_harmful: float = 0.5
    """Participation sum a^2 of attention in excess of equal weights: half of the weight squared on one key."""
    saturation_untrainable: float = 0.9
    dead_harmful: float = 1e-3
    """Gradient norm of a matrix over the largest in its branch."""
    off_theory: float = 4.0
    """Measured over predicted stream variance, or its inverse."""


THRESHOLDS = Thresholds()


def judge(trace: Trace, *, reference: Trace | None = None, thresholds: Thresholds = THRESHOLDS) -> tuple[Finding, ...]:
    """Return the findings of a trace, gravest first.

    `reference`: a prediction to hold a measurement against. A quantity that the trace lacks is not judged.
    """
    found: list[Finding] = []
    for stack in dict.fromkeys(tap.stack for tap in trace):
        judge_one = _Judge(trace, stack, thresholds)
        broken = judge_one.not_finite()
        if broken:
            found += broken
            continue
        for findings in (
            judge_one.rank_collapse(),
            judge_one.amplification(),
            judge_one.gradients(),
            judge_one.signal(),
            judge_one.saturation(),
            judge_one.silent(),
            judge_one.dead(),
            judge_one.theory(reference),
        ):
            found += findings
    order = ("untrainable", "harmful", "note")
    return tuple(sorted(found, key=lambda finding: order.index(finding.severity)))


def verdict_of(findings: Iterable[Finding]) -> str:
    """`untrainable` when some finding says so, else `trainable`."""
    return "untrainable" if any(finding.severity == "untrainable" for finding in findings) else "trainable"


def with_shares(trace: Trace, skeleton: Skeleton) -> Trace:
    """A measured trace with the branches' shares: what each brings of the variance of the sum that it enters.

    share = branch_scale^2 var(dropout(branch)) / var(sum), at most 1. Not 1 - stream_scale^2 var(before) / var(sum):
    the two agree in the mean, but where shares are small, chance correlations of stream and branch drown them.
    """
    taps = list(trace.taps)
    places = {tap.name: index for index, tap in enumerate(taps)}
    for stack in skeleton.stacks:
        names = [(f"{stack.name}.{layer}.{sub.part}", sub) for layer, subs in enumerate(stack.layers) for sub in subs]
        for place, (name, sub) in enumerate(names):
            after = f"{name}.sum" if sub.placement == "post" else f"{stack.name}.output"
            if sub.placement == "pre" and place + 1 < len(names):
                after = f"{names[place + 1][0]}.input"
            if not {f"{name}.branch", after} <= places.keys():
                continue
            index = places[f"{name}.branch"]
            branch, total = taps[index].forward, taps[places[after]].forward
            if branch is None or total is None or not total.variance > 0.0:
                continue
            added = dropout(branch, sub.dropout if skeleton.training else 0.0)
            taps[index] = replace(taps[index], share=min(1.0, sub.branch_scale**2 * added.variance / total.variance))
    return replace(trace, taps=tuple(taps))


class _Judge:
    """One stack of one trace."""

    def __init__(self, trace: Trace, stack: str, thresholds: Thresholds) -> None:
        self.trace, self.stack, self.t = trace, stack, thresholds
        self.source = "measured" if trace.source == "measured" else "predicted"
        self.stream = trace.stream(stack)
        self.branches = [tap for tap in trace.at("branch") if tap.stack == stack]

    def finding(
        self, kind: str, severity: str, depth: int | None, value: float, threshold: float, evidence: str
    ) -> Finding:
        return Finding(kind, severity, self.stack, depth, self.source, value, threshold, evidence)

    def not_finite(self) -> list[Finding]:
        for tap in self.trace:
            if tap.stack != self.stack:
                continue
            values = [*_numbers(tap.forward), *_numbers(tap.backward)]
            if not all(math.isfinite(value) for value in values):
                evidence = f"{tap.name} holds values that are infinite or undefined."
                return [self.finding("not_finite", "untrainable", tap.layer, math.nan, math.nan, evidence)]
        return []

    def rank_collapse(self) -> list[Finding]:
        distinct = [(tap, 1.0 - tap.forward.correlation) for tap in self.stream if tap.forward is not None]
        if not distinct:
            return []
        left = distinct[-1][1]
        severity = _grade(left, self.t.distinct_harmful, self.t.distinct_untrainable, low=True)
        if severity is None:
            return []
        limit = self.t.distinct_untrainable if severity == "untrainable" else self.t.distinct_harmful
        depth = next(tap.layer for tap, value in distinct if value <= limit)
        evidence = (
            f"at the end of the {self.stack} only {left:.2g} of the variance still tells tokens apart, the rest they "
            f"share (a fault below {limit:g}, crossed at layer {_layer(depth)})."
        )
        return [self.finding("rank_collapse", severity, depth, left, limit, evidence)]

    def amplification(self) -> list[Finding]:
        shares = [(tap, tap.share) for tap in self.branches if tap.share is not None]
        total = sum(share for _, share in shares)
        severity = _grade(total, self.t.amplification_harmful, self.t.amplification_untrainable)
        if severity is None:
            return []
        limit = self.t.amplification_untrainable if severity == "untrainable" else self.t.amplification_harmful
        running, depth = 0.0, None
        for tap, share in shares:
            running += share
            if running > limit:
                depth = tap.layer
                break
        evidence = (
            f"the branches' shares in their sums add up to {total:.3g} over {len(shares)} branches; a small relative "
            f"change of all weights is amplified that much (a fault above {limit:g}, crossed at layer {_layer(depth)})."
        )
        return [self.finding("update_amplification", severity, depth, total, limit, evidence)]

    def gradients(self) -> list[Finding]:
        """Along the stream but for its first point: a norm that divides a small embedding is no fault of depth."""
        points = [tap for tap in self.stream if tap.backward is not None][1:]
        if len(points) < 2 or not points[-1].backward or not points[-1].backward.variance > 0.0:
            return []
        end = points[-1].backward.variance
        ratio = points[0].backward.variance / end if points[0].backward else 1.0
        kind = "exploding_gradient" if ratio > 1.0 else "vanishing_gradient"
        size = max(ratio, 1.0 / ratio) if ratio > 0.0 else math.inf
        severity = _grade(size, self.t.gradient_ratio_harmful, self.t.gradient_ratio_untrainable)
        if severity is None:
            return []
        limit = self.t.gradient_ratio_untrainable if severity == "untrainable" else self.t.gradient_ratio_harmful
        depth = None
        for tap in reversed(points):
            here = tap.backward.variance / end if tap.backward else 1.0
            if max(here, 1.0 / here if here > 0.0 else math.inf) > limit:
                depth = tap.layer
                break
        word = "grows" if ratio > 1.0 else "shrinks"
        evidence = (
            f"the gradient's variance {word} by {number(size)} from the last to the first layer of the {self.stack} "
            f"(a fault above {number(limit)}, crossed at layer {_layer(depth)} on the way down)."
        )
        return [self.finding(kind, severity, depth, size, limit, evidence)]

    def signal(self) -> list[Finding]:
        points = [tap for tap in self.stream if tap.forward is not None]
        if len(points) < 4 or points[2].forward is None or points[-1].forward is None:
            return []
        first, last = points[2].forward.variance, points[-1].forward.variance
        growth = last / first if first > 0.0 else math.inf
        if not growth > self.t.stream_growth_harmful:
            return []
        limit = self.t.stream_growth_harmful
        depth = next((tap.layer for tap in points if tap.forward and tap.forward.variance > limit * first), None)
        evidence = (
            f"the stream's variance grows from {number(first)} behind the first layer to {number(last)} at the end, "
            f"{number(growth)} times, so each later layer changes it less."
        )
        return [self.finding("exploding_signal", "harmful", depth, growth, limit, evidence)]

    def saturation(self) -> list[Finding]:
        worst: tuple[float, Tap] | None = None
        first: Tap | None = None
        for tap in self.branches:
            if tap.attention is None:
                continue
            flat = math.exp(-tap.attention.uniform_entropy)
            excess = max(0.0, (tap.attention.participation - flat) / max(1.0 - flat, 1e-12))
            if first is None and excess > self.t.saturation_harmful:
                first = tap
            if worst is None or excess > worst[0]:
                worst = excess, tap
        if worst is None or first is None:
            return []
        value, tap = worst
        stats = tap.attention
        assert stats is not None
        severity = _grade(value, self.t.saturation_harmful, self.t.saturation_untrainable) or "harmful"
        limit = self.t.saturation_untrainable if severity == "untrainable" else self.t.saturation_harmful
        evidence = (
            f"layer {_layer(tap.layer)} attends to {1.0 / max(stats.participation, 1e-12):.2g} keys on average, its "
            f"largest weight is {stats.largest_weight:.2f} and the standard deviation of its scores "
            f"{stats.score_variance**0.5:.3g}."
        )
        return [self.finding("attention_saturation", severity, first.layer, value, limit, evidence)]

    def silent(self) -> list[Finding]:
        shares = [tap.share for tap in self.branches if tap.share is not None]
        if len(shares) < 8:
            return []
        quarter = shares[-(len(shares) // 4) :]
        mean = sum(quarter) / len(quarter)
        limit = self.t.silent_share / len(shares)
        if mean >= limit:
            return []
        depth = next((tap.layer for tap in self.branches if tap.share is not None and tap.share < limit), None)
        evidence = (
            f"the branches of the last quarter bring {mean:.2g} of the stream's variance each; they start nearly "
            f"silent and must grow before they do anything."
        )
        return [self.finding("silent_branches", "note", depth, mean, limit, evidence)]

    def dead(self) -> list[Finding]:
        dead: list[tuple[Tap, str, float]] = []
        for tap in self.branches:
            if not tap.matrix_gradients:
                continue
            largest = max(tap.matrix_gradients.values())
            for name, norm in tap.matrix_gradients.items():
                if not norm > self.t.dead_harmful * largest:
                    dead.append((tap, name, norm / largest if largest > 0.0 else 0.0))
        if not dead:
            return []
        tap, _, _ = dead[0]
        names = sorted({name for _, name, _ in dead})
        least = min(value for _, _, value in dead)
        evidence = (
            f"the gradient of {' and '.join(names)} is as small as {least:.2g} of the largest in its branch, in "
            f"{len({place.name for place, _, _ in dead})} of {len(self.branches)} branches."
        )
        return [self.finding("dead_matrix", "note", tap.layer, least, self.t.dead_harmful, evidence)]

    def theory(self, reference: Trace | None) -> list[Finding]:
        if reference is None:
            return []
        worst: tuple[float, Tap] | None = None
        for tap in self.stream:
            if tap.name not in reference or tap.forward is None:
                continue
            asked = reference[tap.name].forward
            if asked is None or not (asked.variance > 0.0 and tap.forward.variance > 0.0):
                continue
            ratio = tap.forward.variance / asked.variance
            size = max(ratio, 1.0 / ratio)
            if worst is None or size > worst[0]:
                worst = size, tap
        if worst is None or worst[0] <= self.t.off_theory:
            return []
        size, tap = worst
        evidence = (
            f"at {tap.name} the measured variance differs from the predicted one by a factor of {number(size)}; the "
            f"theory describes independent random weights, which trained weights are not."
        )
        return [self.finding("off_theory", "note", tap.layer, size, self.t.off_theory, evidence)]


def _grade(value: float, harmful: float, untrainable: float, *, low: bool = False) -> str | None:
    worse = (lambda limit: value <= limit) if low else (lambda limit: value > limit)
    if worse(untrainable):
        return "untrainable"
    return "harmful" if worse(harmful) else None


def _layer(depth: int | None) -> str:
    return "the end" if depth is None else str(depth)


def _numbers(moments: object) -> Sequence[float]:
    return [] if moments is None else list(vars(moments).values())
