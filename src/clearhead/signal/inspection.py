"""Prediction beside measurement, findings, and advice: `clearhead.signal.inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.anatomy.find import anatomy_of, unwrap
from clearhead.init.embedding_correlation import batch_repetition
from clearhead.models.config import ModelConfig
from clearhead.models.make import build_model
from clearhead.signal.advise import Command, advise_config, advise_model
from clearhead.signal.describe import describe
from clearhead.signal.findings import Advice, Finding, Report
from clearhead.signal.measurement import measure
from clearhead.signal.observed import observations, standing, token_ids
from clearhead.signal.prediction import UNIT, predict_skeleton
from clearhead.signal.skeleton import Embedding, Skeleton
from clearhead.signal.trace import Trace
from clearhead.signal.verdicts import judge, verdict_of, with_shares

GRAVITY = ("untrainable", "harmful", "note")
LARGEST_COPY = 300_000_000
"""A model with more parameters is not copied to try an initialisation on it."""


def predict(source: ModelConfig | nn.Module, **options: Any) -> Trace:
    """Return what the theory says of a config or a model: moments at every tap, forward and backward.

    Options: tokens, repetition, segment_repetition, training (see `clearhead.signal.describe.describe`);
    output_gradient, sequences (see `clearhead.signal.prediction.predict_skeleton`). Under a second for 1,000 layers.
    """
    backward = {name: options.pop(name) for name in ("output_gradient", "sequences") if name in options}
    return predict_skeleton(describe(source, **options), **backward)


def inspect(
    source: ModelConfig | nn.Module,
    batch: Any = None,
    *,
    tokens: int | None = None,
    title: str | None = None,
    seed: int = 0,
    command: Command | None = None,
    **measure_options: Any,
) -> Report:
    """Diagnose a model: theory beside measurement, layer by layer, what is wrong, and what would repair it.

    Args:
        source: a config (described by what its initialisation asks for, and built when there is a batch), or a model,
            which is left as it was; ours, Hugging Face's, timm's or a plain one.
        batch: what `clearhead.signal.measure` takes; None = the theory alone.
        tokens: length of the sequences when there is no batch.
        title: of the report; default the model's kind.
        seed: of a config's weights.
        command: makes the shell command that tests an advice; the command line gives one.
        measure_options: passed to `measure` (loss, rows, valid ...).

    Raises `UserError`, in one line, for a model without attention and for a batch that does not fit.
    """
    config = source if isinstance(source, ModelConfig) else getattr(unwrap(source), "config", None)
    config = config if isinstance(config, ModelConfig) else None
    model = None if isinstance(source, ModelConfig) and batch is None else source
    if isinstance(model, ModelConfig):
        model = build_model(model, seed)

    measured: Trace | None = None
    repetition: float | None = None
    segments, gradient, sequences = 1.0, UNIT, 1
    if model is not None and batch is not None:
        measured = measure(model, batch, seed=seed, **measure_options)
        repetition, segments = _repetitions(batch)
        tokens = measured.facts.get("tokens", tokens)
        sequences = measured.facts.get("batch", 1)
        seen = measured[f"{measured.taps[-1].stack}.output"].backward
        gradient = UNIT if seen is None else seen
    described = source if model is None else model
    skeleton = describe(
        described,
        tokens=tokens,
        repetition=repetition,
        segment_repetition=segments,
        training=True if model is None else model.training,
    )
    start = None
    if model is not None and measured is not None:
        start = partial(_from_measurement, model=model, measured=measured)
    skeleton = skeleton if start is None else start(skeleton)
    predicted = predict_skeleton(skeleton, output_gradient=gradient, sequences=sequences)
    findings = judge(predicted)
    verdict: str | None = None
    shown: dict[str, float] = {}
    if measured is not None:
        measured = with_shares(measured, skeleton)
        findings = _merged(findings, judge(measured, reference=predicted))
        if not isinstance(source, ModelConfig):  # what was built just now is a random start
            verdict, shown = standing(batch, measured, findings)

    known: dict[str, Any] = {
        "tokens": skeleton.tokens,
        "repetition": repetition,
        "segment_repetition": segments,
        "output_gradient": gradient,
        "sequences": sequences,
    }
    advice: tuple[Advice, ...] = ()
    if verdict is not None:
        findings = observations(findings)
        kept = "the weights are not a random start's, so no initialisation is advised; it would undo training"
        predicted = replace(predicted, notes=(*predicted.notes, kept))
    elif config is not None:
        advice = advise_config(config, findings, command=command, **known)
    elif model is not None and sum(p.numel() for p in model.parameters()) <= LARGEST_COPY:
        advice = advise_model(unwrap(model), findings, start=start, **known)
    return Report(
        title=title or ("a config" if model is None else type(unwrap(model)).__name__),
        predicted=predicted,
        measured=measured,
        findings=findings,
        advice=advice,
        verdict=verdict or verdict_of(findings),
        facts=_facts(config, model, measured, skeleton.width, skeleton.tokens, [len(s.layers) for s in skeleton.stacks])
        | shown,
    )


def _from_measurement(skeleton: Skeleton, *, model: nn.Module, measured: Trace) -> Skeleton:
    """A stack without a table of tokens (pixels, sound) starts from what was measured: no theory leads to it."""
    stacks, notes = [], list(skeleton.notes)
    for stack, part in zip(skeleton.stacks, anatomy_of(model).stacks, strict=True):
        first = next((tap.forward for tap in measured.stream(stack.name)), None)
        if first is not None and first.variance > 0.0 and all(table.role != "token" for table in part.embeddings):
            stack = replace(stack, embedding=Embedding((first.variance,), (max(0.0, first.correlation),)))
            notes = [note for note in notes if not note.startswith(f"{stack.name}: no embedding table")]
            notes.append(f"{stack.name}: reads no tokens; the theory starts from its measured first stream")
        stacks.append(stack)
    return replace(skeleton, stacks=tuple(stacks), notes=tuple(notes))


def _merged(predicted: Sequence[Finding], measured: Sequence[Finding]) -> tuple[Finding, ...]:
    """One finding a kind and stack: the measured one, marked `both` when the theory had it too.

    A fault that the theory alone sees is kept as a note: the measurement is nearer to the truth.
    """
    theory = {(finding.kind, finding.stack): finding for finding in predicted}
    seen = {(finding.kind, finding.stack) for finding in measured}
    both = [
        replace(finding, source="both" if (finding.kind, finding.stack) in theory else "measured")
        for finding in measured
    ]
    both += [
        replace(finding, severity="note", evidence=f"{finding.evidence} The measurement does not show it.")
        for key, finding in theory.items()
        if key not in seen
    ]
    return tuple(sorted(both, key=lambda finding: GRAVITY.index(finding.severity)))


def _repetitions(batch: Any) -> tuple[float | None, float]:
    """How often two tokens, and two segments, of a sequence are equal; None where the batch holds no token ids."""
    ids, segments, valid = token_ids(batch), None, None
    if isinstance(batch, Mapping):
        segments = batch.get("token_type_ids")
        valid = next((batch[name] for name in ("attention_mask", "valid", "source_valid") if name in batch), None)
    if ids is None:
        return None, 1.0
    mask = None if not isinstance(valid, Tensor) or valid.shape != ids.shape else valid.bool().cpu().numpy()
    repeated = batch_repetition(ids.cpu().numpy(), mask)
    shared = 1.0 if segments is None else batch_repetition(segments.cpu().numpy(), mask)
    return repeated, shared


def _facts(
    config: ModelConfig | None,
    model: nn.Module | None,
    measured: Trace | None,
    width: int,
    tokens: int,
    layers: list[int],
) -> dict[str, Any]:
    facts: dict[str, Any] = {"layers": " + ".join(map(str, layers)), "width": width, "tokens": tokens}
    if model is not None:
        facts["family"] = anatomy_of(model).family if measured is None else measured.facts["family"]
        facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        facts["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    if config is not None:
        facts["init"], facts["norm_placement"] = config.init, config.norm_placement
        facts["attention"], facts["dropout"] = config.attention, config.dropout
    if measured is not None:
        facts |= {name: value for name, value in measured.facts.items() if name not in facts}
    facts["torch"] = torch.__version__
    return facts
