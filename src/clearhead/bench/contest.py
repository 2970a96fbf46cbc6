"""From a group of the plan to what is timed: built, run once, and held against ours before any clock starts."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from clearhead.bench.plan import Group, Model, Shape
from clearhead.bench.prepared import Problem, SourceModule, Step, Training
from clearhead.bench.registry import Competitor, of_specs
from clearhead.errors import UserError

TOLERANCE = {"float64": 1e-6, "float32": 5e-5, "bfloat16": 0.1, "float16": 0.02}
"""Largest difference allowed, as a share of the largest entry; three times that for gradients. It tells another
formula from ours, not a rounding: some take softmax in float32 even of float64, and what is written out in bfloat16
rounds after each operation."""
Outputs = tuple[Tensor, ...]


@dataclass(eq=False)
class Entry:
    """A competitor that can be timed. `difference` is from ours, None where the formula is another."""

    competitor: Competitor
    run: Callable[[], object]
    first: float
    """CPU seconds of its first run."""
    parameters: int | None = None
    difference: float | None = None


@dataclass(frozen=True)
class Absent:
    """A competitor that is not timed, and why."""

    competitor: Competitor
    status: str
    """not installed | differs | failed."""
    reason: str


class Contest:
    """All competitors of one group, ready to be timed."""

    def __init__(self, group: Group, seed: int) -> None:
        self.group = group
        shape = group.on
        self._problem = Problem(shape, seed) if isinstance(shape, Shape) else None
        self._training = Training(shape, seed) if isinstance(shape, Model) else None
        self._references: dict[tuple[str, str], Outputs] = {}
        self.entries: list[Entry] = []
        self.absent: list[Absent] = []

    def prepare(self, on_each: Callable[[str], None] = lambda name: None) -> None:
        """Build everyone, run each once and check it.

        A rival that is not installed, fails in its own code, or computes something else is put into `absent`. Raises
        what our own code raises.
        """
        for one in self.group.competitors:
            on_each(one.name)
            if not one.of.installed:
                self.absent.append(Absent(one, "not installed", one.of.pip))
                continue
            try:
                entry, outputs = self.build(one)
            except Exception as error:
                if one.source in ("clearhead", "torch") or isinstance(error, UserError):
                    raise
                words = " ".join(str(error).split())[:200]
                self.absent.append(Absent(one, "failed", f"{type(error).__name__}: {words}"))
                continue
            problem = self._check(entry, outputs)
            if problem and one.name == self.group.baseline:
                raise RuntimeError(f"{one.name}: {problem}")
            if problem:
                self.absent.append(Absent(one, "differs", problem))
            else:
                self.entries.append(entry)

    def build(self, one: Competitor) -> tuple[Entry, Outputs]:
        """Make what is timed, and run it once: what it answered is checked."""
        if self._training is not None:
            made = self._module(one).step(one.option, self._training)
            outputs = step_outputs(made, self._training)
            began = time.process_time()
            made.run()
            return Entry(one, made.run, time.process_time() - began, made.parameters), outputs
        run = self.build_only(one)
        began = time.process_time()
        outputs = cast(Outputs, run())
        return Entry(one, run, time.process_time() - began), outputs

    def build_only(self, one: Competitor) -> Callable[[], object]:
        """Make what is timed, and do not run it."""
        if self._training is not None:
            return self._module(one).step(one.option, self._training).run
        assert self._problem is not None
        return attention_run(self.group.operation, self._module(one), one.option, self._problem)

    @staticmethod
    def _module(one: Competitor) -> SourceModule:
        return cast(SourceModule, importlib.import_module(one.of.module))

    def _check(self, entry: Entry, outputs: Outputs) -> str | None:
        """Say how far it is from ours, where the maths is the same; None when all is well."""
        one = entry.competitor
        if one.source == "clearhead":
            self._references.setdefault((one.option, ""), outputs)
        if one.source == "clearhead" or one.equals is None:
            return None
        dtype = self.group.on.dtype if isinstance(self.group.on, Shape) else "float32"
        reference = self._reference(one)
        for place, (own, ours) in enumerate(zip(outputs, reference, strict=True)):
            allowed = TOLERANCE[dtype] * (1 if place == 0 else 3)
            far = difference(own, ours)
            entry.difference = max(entry.difference or 0.0, far)
            if not far <= allowed:
                what = "output" if place == 0 else f"gradient {place}"
                return f"its {what} differs from ours by {far:.1e} of the largest entry, {allowed:.0e} is allowed"
        return None

    def _reference(self, one: Competitor) -> Outputs:
        """What ours answers to the same inputs: values clamped where the rival clamps them, in the rival's form."""
        assert one.equals is not None
        variant = {"nanogpt": "gpt", "x-transformers": "clamped"}.get(one.source, "")
        variant = "" if variant == "clamped" and not one.option.startswith("laser") else variant
        key = one.equals, variant
        if key not in self._references:
            ours = next(x for x in of_specs([one.equals]) if x.source == "clearhead")
            if self._training is not None:
                model: Any = self._training.decoder(ours.option, "gpt" if variant else "llama")
                made = Step(model, lambda: None, model.embedding.weight)
                self._references[key] = step_outputs(made, self._training)
            else:
                assert self._problem is not None
                module = cast(SourceModule, importlib.import_module(ours.of.module))
                self._references[key] = attention_run(
                    self.group.operation, module, ours.option, self._problem, clamp=variant == "clamped"
                )()
        return self._references[key]

    def forget(self) -> None:
        """Let go of what was only needed for the check."""
        self._references.clear()


def attention_run(
    operation: str, module: SourceModule, option: str, problem: Problem, *, clamp: bool = False
) -> Callable[[], Outputs]:
    """What is timed of an attention: it answers the output, and the gradients where the operation has them."""
    if clamp:
        from clearhead.bench.sources.x_transformers import clamped

        if operation == "decode":  # the cache holds values as they are clamped
            problem = _with_values(problem, clamped(problem.v))
    if operation == "decode":
        with torch.no_grad():
            decode = module.decode(option, problem)

        def one_token() -> Outputs:
            with torch.no_grad():
                return (decode(),)

        return one_token
    attend = module.attention(option, problem)
    q, k, v, gradient = problem.q, problem.k, problem.v, problem.gradient
    if operation == "forward":

        def forward() -> Outputs:
            with torch.no_grad():
                return (attend(q, k, clamped(v) if clamp else v),)

        return forward
    taus = learned(option, problem)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]

    def both() -> Outputs:
        own_v = clamped(leaves[2]) if clamp else leaves[2]
        out = attend(leaves[0], leaves[1], own_v)
        return (out, *torch.autograd.grad(out, [*leaves, *taus], gradient))

    return both


def learned(option: str, problem: Problem) -> list[Tensor]:
    """The temperatures that get a gradient; a rival's option is no spec, and rivals have none."""
    try:
        return list(problem.temperatures(option).values())
    except UserError:
        return []


def _with_values(problem: Problem, values: Tensor) -> Problem:
    import copy

    other = copy.copy(problem)
    other.v = values
    return other


def step_outputs(made: Step, training: Training) -> Outputs:
    """Logits, and the gradient that reaches the token table through everything."""
    import torch.nn.functional as F

    logits = made.model(training.inputs)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), training.targets.flatten())
    (gradient,) = torch.autograd.grad(loss, [made.embedding])
    return logits.detach(), gradient


def difference(own: Tensor, ours: Tensor) -> float:
    """Largest difference as a share of the largest entry; infinite where shapes differ or something is not finite."""
    if own.shape != ours.shape or not bool(own.isfinite().all()):
        return float("inf")
    largest = ours.abs().max().double().item()
    return (own.double() - ours.double()).abs().max().item() / max(largest, 1e-30)
