"""A whole bench: every group prepared, checked, timed in turns, and its memory measured."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from clearhead.bench import peak
from clearhead.bench.contest import Contest
from clearhead.bench.machine import facts, load_average
from clearhead.bench.page import FORMAT, KIND
from clearhead.bench.plan import MOST_ROUNDS, Group, Plan
from clearhead.bench.registry import Competitor
from clearhead.bench.timing import Clock, interleaved, summarise
from clearhead.train.world import choose_device


class Watcher(Protocol):
    """Whoever wants to see how far it is."""

    def group(self, group: Group) -> None:
        """A group begins."""

    def doing(self, words: str, share: float) -> None:
        """What is done in it, and which share of it is over."""

    def measured(self, found: dict[str, Any]) -> None:
        """A group is done."""


class Silent:
    """Sees nothing."""

    def group(self, group: Group) -> None:
        """See `Watcher`."""

    def doing(self, words: str, share: float) -> None:
        """See `Watcher`."""

    def measured(self, found: dict[str, Any]) -> None:
        """See `Watcher`."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread inside a `with` block, as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(plan: Plan, watcher: Watcher | None = None) -> dict[str, Any]:
    """Measure, and return what the JSON file holds. Raises `UserError` for a device that is not there."""
    watcher = Silent() if watcher is None else watcher
    device = choose_device(plan.device, 0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_thread())
        before = load_average()
        measure_peak = _peaks(plan, device, stack)
        groups = [_group(group, plan, device, measure_peak, watcher) for group in plan.groups()]
        return {
            "what": KIND,
            "format": FORMAT,
            "machine": facts(device),
            "load_before": before,
            "load_after": load_average(),
            "plan": plan.to_dict(),
            "clock": Clock.of(device).words,
            "groups": groups,
        }


PeakOf = Callable[[Group, Competitor, Callable[[], object]], int | None]


def _peaks(plan: Plan, device: torch.device, stack: contextlib.ExitStack) -> PeakOf | None:
    """How peak memory is measured, if it is."""
    if not plan.memory:
        return None
    if device.type == "cuda":
        return functools.partial(_cuda_peak, device=device)
    if device.type != "cpu" or not peak.possible():
        return None
    everyone = [one for group in plan.groups() for one in group.competitors if one.of.installed]
    packages = [name for source, name in peak.PACKAGES.items() if source in {one.source for one in everyone}]
    server = stack.enter_context(peak.PeakServer(packages))
    # Compiling once more only to see its memory would take longer than all the rest.
    return lambda group, one, run: None if one.source == "compiled" else server.ask(group, one, plan.seed)


def _cuda_peak(group: Group, one: Competitor, run: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _group(
    group: Group, plan: Plan, device: torch.device, measure_peak: PeakOf | None, watcher: Watcher
) -> dict[str, Any]:
    watcher.group(group)
    contest = Contest(group, plan.seed)
    contest.prepare(lambda name: watcher.doing(f"checking {name}", 0.0))
    contest.forget()
    load = load_average()
    times = interleaved(
        {entry.competitor.name: entry.run for entry in contest.entries},
        Clock.of(device),
        rounds=plan.rounds,
        most=max(MOST_ROUNDS, plan.rounds),
        seconds=plan.seconds,
        seed=plan.seed,
        first={entry.competitor.name: entry.first for entry in contest.entries},
        on_round=lambda done: watcher.doing(f"round {done}", min(1.0, done / plan.rounds)),
    )
    base = times.seconds[group.baseline]
    results: dict[str, Any] = {}
    for entry in contest.entries:
        one, own = entry.competitor, times.seconds[entry.competitor.name]
        known = measure_peak is not None and group.operation != "decode"
        watcher.doing(f"memory of {one.name}" if known else "done", 1.0)
        results[one.name] = {
            **_about(one),
            **summarise(own, base),
            "parameters": entry.parameters,
            "difference": entry.difference,
            "peak_bytes": measure_peak(group, one, entry.run) if known and measure_peak is not None else None,
            "seconds": [float(f"{x:.6g}") for x in own],
        }
    found = {
        "operation": group.operation,
        "on": group.on.name if group.operation == "step" else "",  # type: ignore[union-attr]
        "length": group.on.length,
        "title": group.title,
        "shape": group.on.text,
        "baseline": group.baseline,
        "rounds": len(base),
        "load": load,
        "cpu_share": round(times.cpu_share, 4),
        "results": results,
        "absent": [
            {
                "name": absent.competitor.name,
                **_about(absent.competitor),
                "status": absent.status,
                "reason": absent.reason,
            }
            for absent in contest.absent
        ],
    }
    watcher.measured(found)
    contest.entries.clear()
    gc.collect()
    return found


def _about(one: Competitor) -> dict[str, Any]:
    return {"source": one.source, "family": one.family, "equals": one.equals, "beside": one.beside, "note": one.note}


def to_json(record: dict[str, Any]) -> str:
    """The record as text, a list of numbers on one line."""
    return _json(record, "") + "\n"


def _json(value: Any, indent: str) -> str:
    inner = indent + " "
    if isinstance(value, dict) and value:
        parts = [f"{inner}{json.dumps(key)}: {_json(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(inner + _json(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value)
