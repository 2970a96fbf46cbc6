"""The tables and the figure of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.admin.chart import Chart, Line, draw
from experiments.running import mean_half

BASE = "softmax"


def page(results: Mapping[str, Any]) -> list[str]:
    """What stands between the README's marks."""
    lines: list[str] = []
    if results.get("zero_shot"):
        lines += ["### Without training", "", *zero_shot_table(results["zero_shot"])]
    if results.get("recovery"):
        lines += ["### Trained on", "", "![validation by step](results/recovery.svg)", ""]
        lines += recovery_table(results["recovery"])
    return lines


def figures(results: Mapping[str, Any]) -> dict[str, str]:
    """File name -> SVG."""
    return {"recovery.svg": recovery_figure(results["recovery"])} if results.get("recovery") else {}


def zero_shot_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Bits per byte as it is, and the paired difference over documents."""
    base = next(row for row in rows if row["attention"] == BASE)
    own = {document["name"]: document["bits_per_byte"] for document in base["documents"]}
    lines = [
        f"| attention | bits per byte | less softmax, over {len(own)} documents | perplexity per token |",
        "|---|---|---|---|",
    ]
    for row in rows:
        found = [document["bits_per_byte"] - own[document["name"]] for document in row["documents"]]
        difference = "" if row is base else signed(found)
        perplexity = math.exp(min(row["nats_per_token"], 700.0))
        lines.append(f"| {row['attention']} | {row['bits_per_byte']:.4f} | {difference} | {perplexity:,.1f} |")
    return [*lines, "", f"{base['tokens']:,} tokens of the test text were scored.", ""]


def recovery_table(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where each begins and ends, when it is back, and the paired difference to softmax trained alike."""
    by = group(runs)
    level = by[BASE][0]["curve"][0]["bits_per_byte"]
    steps = max(run["steps"] for run in runs)
    lines = [
        f"| seeds: {len(by[BASE])} | validation at once | after {steps} steps | back at {level:.4f} after, by seed | "
        f"test, less softmax trained alike | CPU s a step |",
        "|---|---|---|---|---|---|",
    ]
    for attention, own in by.items():
        base = {run["seed"]: run["test_bits_per_byte"] for run in by[BASE]}
        pairs = [
            run["test_bits_per_byte"] - base[run["seed"]]
            for run in own
            if run["test_bits_per_byte"] is not None and base.get(run["seed"]) is not None
        ]
        last = [run["curve"][-1]["bits_per_byte"] for run in own if run["curve"][-1]["bits_per_byte"] is not None]
        back = (
            ""
            if attention == BASE
            else ", ".join("not" if at is None else str(at) for at in (back_after(run, level) for run in own))
        )
        lines.append(
            f"| {attention} | {own[0]['curve'][0]['bits_per_byte']:.4f} | {plain(last)} | {back} | "
            f"{'' if attention == BASE else signed(pairs)} | {min(run['step_cpu_seconds'] for run in own):.2f} |"
        )
    return [*lines, ""]


def back_after(run: Mapping[str, Any], level: float) -> int | None:
    """The first step that was looked at where validation is at the pretrained model's level or below."""
    for point in run["curve"]:
        if point["bits_per_byte"] is not None and point["bits_per_byte"] <= level * (1 + 1e-6):
            return int(point["step"])
    return None


def recovery_figure(runs: Sequence[Mapping[str, Any]]) -> str:
    """Validation by step: the mean over seeds, and their range."""
    lines = []
    by = group(runs)
    for colour, (attention, own) in enumerate(by.items()):
        steps = [point["step"] for point in own[0]["curve"]]
        values = [[run["curve"][i]["bits_per_byte"] for run in own] for i in range(len(steps))]
        mean, low, high = ([f(x) for x in values] for f in (lambda x: sum(x) / len(x), min, max))
        lines.append(Line(attention, steps, mean, colour, dots=True, low=low, high=high))
    level = by[BASE][0]["curve"][0]["bits_per_byte"]
    lines.append(Line("softmax before", [0, lines[0].across[-1]], [level] * 2, 7, dashed=True))
    return draw([Chart("validation", "step", "bits per byte", lines)], columns=1)


def group(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Finished runs by attention, softmax first; a run that diverged has no end to show and is said in words."""
    order = sorted(runs, key=lambda run: (run["attention"] != BASE, run["attention"], run["seed"]))
    by: dict[str, list[Mapping[str, Any]]] = {}
    for run in order:
        if run["status"] == "finished":
            by.setdefault(run["attention"], []).append(run)
    return by


def signed(values: Sequence[float]) -> str:
    """A mean with sign and Student's 95 % interval."""
    if not values:
        return "n/a"
    mean, half = mean_half(values)
    return f"{mean:+.4f}" if half is None else f"{mean:+.4f} ± {half:.4f}"


def plain(values: Sequence[float]) -> str:
    """A mean with Student's 95 % interval."""
    if not values:
        return "n/a"
    mean, half = mean_half(values)
    return f"{mean:.4f}" if half is None else f"{mean:.4f} ± {half:.4f}"
