"""The last part of the page: how everything was measured, and what must be known of those who took part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from clearhead.bench.registry import SOURCES

TEXT = """\
One process, one thread. The clock is {clock}. Each round times everyone of a table once, in a new order, and a ratio is
taken within the round; what takes under 2 ms is called several times in a row. Before any clock starts, everyone runs
once on the same inputs, and who claims the formula of one of our specs must give its output and gradients (of a
training step: the logits, and the gradient of the token table, from the same weights). The largest difference found
stands in the last column, as a share of the largest entry. A rival that differs or fails is listed, not timed.

Peak memory: on Linux each measurement is a process of its own, forked from one that has everything imported. The
kernel's high-water mark of resident memory is set back once inputs and weights exist, and what it rises by during one
run is the figure. On CUDA it is what torch's allocator held at most, above what it held before.

Temperatures (`selective`, `learned`) are given to the attention and get a gradient; in a training step the layers
compute them. Each decodes with its own cache. In a training step ours takes the step of `clearhead train`, rivals a
plain loop: loss, backward, clipping, fused AdamW. All take the same tokens."""


def method(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    every = list(records)
    clock = " or ".join(dict.fromkeys(record["clock"] for record in every))
    lines = ["", "## How it is measured", "", TEXT.format(clock=clock), "", "| | |", "|---|---|"]
    groups = [group for record in every for group in record["groups"]]
    used = {one["source"] for group in groups for one in (*group["results"].values(), *group["absent"])}
    lines += [f"| {source.name} | {source.what} |" for source in SOURCES.values() if source.name in used]
    notes: dict[str, dict[str, None]] = {}
    for group in groups:
        for name, one in group["results"].items():
            if one["note"]:
                notes.setdefault(one["note"], {})[name] = None
    return [*lines, "", *(f"- {'; '.join(names)}: {note}." for note, names in notes.items())]
