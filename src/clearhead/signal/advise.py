"""Remedies for what was found. Each is tried on the theory first; what it does not confirm is not given as advice."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from clearhead.errors import UserError
from clearhead.models.config import ModelConfig
from clearhead.signal.describe import describe
from clearhead.signal.findings import Advice, Finding
from clearhead.signal.moments.types import GradientMoments
from clearhead.signal.prediction import predict_skeleton
from clearhead.signal.skeleton import Skeleton
from clearhead.signal.trace import Trace
from clearhead.signal.verdicts import judge, verdict_of

Command = Callable[[ModelConfig, Mapping[str, Any]], str]
"""(config, overrides) -> the shell command that compares before with after."""


@dataclass(frozen=True)
class Remedy:
    """Something to try on a config."""

    title: str
    overrides: Mapping[str, Any]
    scheme: str | None
    """The same as a scheme of `clearhead.init_`, for models that are not ours; None = a config change only."""
    against: tuple[str, ...]
    """Kinds of findings that it may cure."""
    reason: str


FOLDED = (
    "The sums of this model stand in code that is left as it is, so the constants go into the branches: the stream "
    "then grows by 1 / lambda^2 a branch, its gradient falls alike, and the norms before the branches take both out."
)

DEPTH = ("rank_collapse", "update_amplification", "vanishing_gradient", "exploding_gradient", "exploding_signal")

REMEDIES: tuple[Remedy, ...] = (
    Remedy(
        "DeepScaleLM's initialisation and residual constants",
        {"init": "deepscale"},
        "deepscale",
        (*DEPTH, "attention_saturation", "silent_branches", "dead_matrix"),
        "Every branch gets variance 1 and every sum lambda^2 + beta^2 = 1 with beta^2 = 2 / layers, so neither signal "
        "nor gradient depends on the depth, and the branches' shares add up to 4 at any depth.",
    ),
    Remedy(
        "Admin: a profiled weight on every shortcut",
        {"init": "admin"},
        None,
        (*DEPTH, "silent_branches"),
        "The shortcut of each sub-layer is weighed by what came before it, so branches share the sum as in a pre-norm "
        "model, while the norm stays behind it. One batch is passed before the first step to find the weights.",
    ),
    Remedy(
        "the norm before the branch",
        {"norm_placement": "pre"},
        None,
        ("rank_collapse", "update_amplification", "vanishing_gradient", "exploding_gradient"),
        "The stream is never normed on its way, so the shares of the branches fall with depth and their sum grows "
        "only with the logarithm of the number of layers.",
    ),
    Remedy(
        "QK-norm",
        {"qk_norm": True},
        None,
        ("attention_saturation",),
        "Queries and keys of fixed length bound the scores, so softmax keeps passing gradient.",
    ),
    Remedy(
        "smaller weights (SmallInit)",
        {"init": "small"},
        "small",
        ("attention_saturation", "exploding_signal", "exploding_gradient"),
        "Weights of variance 2 / (5 width), and output matrices smaller with depth, start scores and branches small.",
    ),
    Remedy(
        "dropout 0.1",
        {"dropout": 0.1},
        None,
        ("rank_collapse",),
        "Dropout makes tokens differ again in every branch and holds their correlation below 1.",
    ),
)


def advise_config(
    config: ModelConfig,
    findings: Sequence[Finding],
    *,
    tokens: int,
    repetition: float | None = None,
    segment_repetition: float = 1.0,
    output_gradient: GradientMoments | None = None,
    sequences: int = 1,
    command: Command | None = None,
) -> tuple[Advice, ...]:
    """Return the remedies that the theory confirms for a model of ours, the best first."""
    advice = []
    for remedy in _fitting(findings):
        if all(getattr(config, name) == value for name, value in remedy.overrides.items()):
            continue
        try:
            after = dataclasses.replace(config, **remedy.overrides)
            skeleton = describe(after, tokens=tokens, repetition=repetition, segment_repetition=segment_repetition)
        except UserError:  # the remedy does not fit this config (Admin and pre-norm, say)
            continue
        pairs = ", ".join(f"{name}={value!r}" for name, value in remedy.overrides.items())
        line = f"config = dataclasses.replace(config, {pairs})"
        if remedy.scheme is not None:
            line = f'ch.init_(model, "{remedy.scheme}")'
        shell = command(config, remedy.overrides) if command is not None else None
        advice.append(_tried(remedy, findings, skeleton, output_gradient, sequences, line, shell))
    return _best(advice)


def advise_model(
    model: nn.Module,
    findings: Sequence[Finding],
    *,
    tokens: int,
    repetition: float | None = None,
    segment_repetition: float = 1.0,
    output_gradient: GradientMoments | None = None,
    sequences: int = 1,
    start: Callable[[Skeleton], Skeleton] | None = None,
) -> tuple[Advice, ...]:
    """The same for a model that is not ours: each scheme is tried on a copy of it.

    `start` puts into a description what only a measurement knows: the first stream of a model that reads no tokens.
    """
    from clearhead.anatomy.find import anatomy_of
    from clearhead.init.apply import init_

    blocks = [block for stack in anatomy_of(model).stacks for block in stack.blocks]
    pre_norm = any(sub.placement == "pre" for block in blocks for sub in block.sublayers)
    advice = []
    for remedy in _fitting(findings):
        if remedy.scheme is None:
            continue
        try:
            trial = copy.deepcopy(model).train()
            init_(trial, remedy.scheme)
            skeleton = describe(trial, tokens=tokens, repetition=repetition, segment_repetition=segment_repetition)
            skeleton = skeleton if start is None else start(skeleton)
        except UserError:  # a model whose residual sums the scheme cannot reach
            continue
        line = f'ch.init_(model, "{remedy.scheme}")'
        if pre_norm and remedy.scheme == "deepscale":
            remedy = dataclasses.replace(remedy, reason=f"{remedy.reason} {FOLDED}")
        advice.append(_tried(remedy, findings, skeleton, output_gradient, sequences, line, None))
    return _best(advice)


def _fitting(findings: Sequence[Finding]) -> list[Remedy]:
    """Remedies against something that hurts; what is only noted needs none."""
    kinds = {finding.kind for finding in findings if finding.severity in ("untrainable", "harmful")}
    return [remedy for remedy in REMEDIES if kinds & set(remedy.against)]


def _tried(
    remedy: Remedy,
    findings: Sequence[Finding],
    skeleton: Skeleton,
    output_gradient: GradientMoments | None,
    sequences: int,
    line: str,
    command: str | None,
) -> Advice | None:
    gradient = GradientMoments(1.0, 0.0) if output_gradient is None else output_gradient
    trace: Trace = predict_skeleton(skeleton, output_gradient=gradient, sequences=sequences)
    after = judge(trace)
    before = [finding for finding in findings if finding.severity in ("untrainable", "harmful")]
    left = {finding.kind for finding in after if finding.severity in ("untrainable", "harmful")}
    kinds = dict.fromkeys(finding.kind for finding in before)
    cures = tuple(kind for kind in kinds if kind not in left)
    worse = verdict_of(after) == "untrainable"
    if not cures or (worse and verdict_of(findings) != "untrainable"):
        return None
    return Advice(
        title=remedy.title,
        cures=cures,
        leaves=tuple(sorted(left)),
        line=line,
        overrides=dict(remedy.overrides),
        reason=remedy.reason,
        predicted=trace,
        command=command,
        verdict=verdict_of(after),
    )


def _best(advice: Sequence[Advice | None]) -> tuple[Advice, ...]:
    given = [one for one in advice if one is not None]
    return tuple(sorted(given, key=lambda one: (one.verdict != "trainable", len(one.leaves), -len(one.cures))))
