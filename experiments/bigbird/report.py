"""The tables and the figure of the BigBird experiment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.admin.chart import Chart, Line, draw
from experiments.bigbird import dna, furthest, needle, words
from experiments.running import mean_half


def page(results: Mapping[str, Any]) -> list[str]:
    """What stands between the README's marks."""
    lines: list[str] = []
    if "needle" in results:
        lines += ["### The needle", "", "![accuracy by step](results/needle.svg)", ""]
        lines += [*needle_table(results["needle"]), "", "### The graph", "", *graph_table(results["needle"]), ""]
    if "furthest" in results:
        lines += ["### The furthest point", "", *furthest_table(results["furthest"]["runs"]), ""]
    if "words" in results:
        lines += ["### Hidden bytes of text", "", *words_table(results["words"]["runs"]), ""]
    if "dna" in results:
        lines += ["### Masked DNA", "", *dna_table(results["dna"]["runs"])]
    return lines


def figures(results: Mapping[str, Any]) -> dict[str, str]:
    """File name -> SVG."""
    return {"needle.svg": needle_figure(results["needle"]["runs"])} if "needle" in results else {}


# ---- the needle ----


def needle_table(found: Mapping[str, Any]) -> list[str]:
    """Final accuracy by seed, beside the best that the pattern allows."""
    lines = [
        "| pattern | keys a token sees | accuracy at the end, by seed | steps | best that the graph allows |",
        "|---|---|---|---|---|",
    ]
    for pattern in needle.PATTERNS:
        own = sorted((run for run in found["runs"] if run["pattern"] == pattern), key=lambda run: run["seed"])
        keys = needle.TOKENS if pattern == "full" else needle.BLOCK * _blocks(pattern)
        cells = [
            pattern,
            str(keys),
            _list([f"{run['accuracy']:.3f}" for run in own]),
            _list([str(run["curve"][-1][0]) for run in own]),
            _list([f"{best:.3f}" for best in found["ceilings"][pattern][: len(own)]]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _blocks(pattern: str) -> int:
    return 3 + (2 if "global" in pattern else 0) + (3 if "random" in pattern else 0)


def _list(cells: Sequence[str]) -> str:
    return ", ".join(cells) or "-"


def needle_figure(runs: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy at each look, one line a run, a colour a pattern."""
    lines = []
    for colour, pattern in enumerate(needle.PATTERNS):
        for place, run in enumerate(run for run in runs if run["pattern"] == pattern):
            steps, right = zip(*run["curve"], strict=True)
            lines.append(Line(pattern, steps, right, colour, listed=place == 0))
    return draw([Chart("needle: accuracy on fresh sequences", "step", "accuracy", lines, limits=(0.0, 1.0))], columns=1)


# ---- the graph ----


def graph_table(found: Mapping[str, Any]) -> list[str]:
    """The diameters over the seeds, by number of blocks."""
    sizes = sorted({row["blocks"] for row in found["diameters"]})
    lines = [f"| diameter in layers | {' | '.join(f'{n} blocks' for n in sizes)} |", f"|---|{'---|' * len(sizes)}"]
    for pattern in needle.PATTERNS:
        own = {row["blocks"]: row["diameters"] for row in found["diameters"] if row["pattern"] == pattern}
        if own:
            lines.append(f"| {pattern} | {' | '.join(_range(own[n]) for n in sizes)} |")
    return lines


def _range(values: Sequence[int | None]) -> str:
    low, high = min(v or 0 for v in values), max(v or 0 for v in values)
    return str(high) if low == high else f"{low} to {high}"


# ---- the furthest point ----


def furthest_table(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Accuracy and bits by pattern and depth, one number a seed, beside what a guess is worth."""
    lines = [
        f"| pattern, {runs[0]['steps']} steps | keys a token sees | layers | accuracy | bits per answer |",
        "|---|---|---|---|---|",
    ]
    for pattern, depths in furthest.LAYERS.items():
        for layers in depths:
            own = [run for run in runs if run["pattern"] == pattern and run["layers"] == layers]
            if own:
                own.sort(key=lambda run: run["seed"])
                accuracy, bits = _list([f"{r['accuracy']:.3f}" for r in own]), _list([f"{r['bits']:.3f}" for r in own])
                lines.append(f"| {pattern} | {furthest.PATTERNS[pattern][1]} | {layers} | {accuracy} | {bits} |")
    there = 1 - (1 - 1 / furthest.POINTS) ** furthest.TOKENS
    return [
        *lines,
        "",
        f"Always naming the opposite point, without a look at the others, is right in {there:.3f} of the cases.",
    ]


# ---- text ----


def words_table(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Bits per hidden byte by pattern, one number a seed; the paired difference to full attention at the same steps."""
    bits_of = {(run["steps"], run["pattern"], run["seed"]): run["nats"] / math.log(2) for run in runs}
    lines: list[str] = []
    for steps in sorted({run["steps"] for run in runs}):
        lines += [
            *([""] if lines else []),
            f"| pattern, {steps} steps | blocks of keys | bits per hidden byte | mean | less full | accuracy |",
            "|---|---|---|---|---|---|",
        ]
        for pattern, (_, blocks) in words.PATTERNS.items():
            own = sorted((r for r in runs if (r["pattern"], r["steps"]) == (pattern, steps)), key=lambda r: r["seed"])
            if own:
                bits = [bits_of[steps, pattern, run["seed"]] for run in own]
                cells = [
                    pattern,
                    f"{blocks} of {words.CONTEXT // words.BLOCK}",
                    _list([f"{b:.3f}" for b in bits]),
                    f"{sum(bits) / len(bits):.3f}",
                    _less_full(bits_of, steps, pattern),
                    _list([format(run["accuracy"], ".3f") for run in own]),
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def _less_full(bits_of: Mapping[tuple[int, str, int], float], steps: int, pattern: str) -> str:
    seeds = sorted(s for at, p, s in bits_of if (at, p) == (steps, pattern) and (steps, "full", s) in bits_of)
    if pattern == "full" or not seeds:
        return "-"
    mean, half = mean_half([bits_of[steps, pattern, s] - bits_of[steps, "full", s] for s in seeds])
    return f"{mean:+.3f}" + ("" if half is None else f" ± {half:.3f}")


# ---- DNA ----


def dna_table(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Bits per hidden base and accuracy by context, one number a seed; Student's interval of the differences."""
    lines = [
        f"| context, {runs[0]['steps']} steps of {dna.BASES_A_STEP:,} bases | bits per hidden base | accuracy |",
        "|---|---|---|",
    ]
    for context in sorted({run["context"] for run in runs}):
        own = sorted((run for run in runs if run["context"] == context), key=lambda run: run["seed"])
        bits = _list([f"{run['nats'] / math.log(2):.4f}" for run in own])
        lines.append(f"| {context:,} | {bits} | {_list([format(run['accuracy'], '.4f') for run in own])} |")
    bits_of = {(run["context"], run["seed"]): run["nats"] / math.log(2) for run in runs}
    shortest, *longer = sorted({run["context"] for run in runs})
    for context in longer:
        seeds = sorted(seed for at, seed in bits_of if at == context and (shortest, seed) in bits_of)
        mean, half = mean_half([bits_of[context, seed] - bits_of[shortest, seed] for seed in seeds])
        if half is not None:
            lines += ["", f"{context:,} less {shortest:,}, paired by seed: {mean:+.4f} ± {half:.4f} bits."]
    return lines
