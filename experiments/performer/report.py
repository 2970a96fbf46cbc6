"""The tables and figures of the performer experiment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.admin.chart import Chart, Line, draw
from experiments.performer import conversion, error
from experiments.running import mean_half

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "results"

# What was measured before this experiment, by another script of ours: slopes of log error over log features at standard
# deviation 0.25, 0.5, 1, and ratios of orthogonal to independent errors of kernel entries at 0.25, 0.5, 0.75.
EARLIER_SLOPES = {"positive, orthogonal": "-0.50, -0.42, -0.03", "positive, independent": "-0.48, -0.40, -0.03"}
EARLIER_RATIOS = {"positive": "0.83, 0.81, 0.71", "trigonometric": "0.15, 0.40, 0.89"}


def page(results: Mapping[str, Any]) -> list[str]:
    """What stands between the README's marks."""
    lines: list[str] = []
    if "error" in results:
        lines += ["### Error by features", "", "![error by number of features](results/error.svg)", ""]
        lines += error_tables(results["error"])
    if results.get("conversion"):
        lines += ["### A softmax model, converted", "", "![recovery by step](results/conversion.svg)", ""]
        lines += conversion_table(_complete(results["conversion"]))
        lines += longer(results["conversion"])
    return [*lines, *length_table()]


def figures(results: Mapping[str, Any]) -> dict[str, str]:
    """File name -> SVG."""
    answer = {}
    if "error" in results:
        answer["error.svg"] = error_figure(results["error"])
    if results.get("conversion"):
        answer["conversion.svg"] = conversion_figure(_complete(results["conversion"]))
    return answer


# ---- error ----


def error_tables(found: Mapping[str, Any]) -> list[str]:
    """Slopes, kernel entries, signs."""
    lines = [
        f"| slope of log error over log features, std | {' | '.join(map(str, error.STDS))} | measured before |",
        f"|---|{'---|' * (len(error.STDS) + 1)}",
    ]
    for law in error.LAWS:
        own = {row["std"]: row["slope"] for row in found["slopes"] if row["law"] == law}
        cells = [f"{own[std]:+.2f}" for std in error.STDS]
        lines.append(f"| {law} | {' | '.join(cells)} | {EARLIER_SLOPES.get(law, '')} |")
    lines += ["", f"| root mean squared error of the output, 16 and {error.FEATURES[-1]} features | "]
    lines[-1] += " | ".join(f"std {std}" for std in error.STDS) + " |"
    lines.append(f"|---|{'---|' * len(error.STDS)}")
    for law in error.LAWS:
        cells = []
        for std in error.STDS:
            own = {row["features"]: row for row in found["outputs"] if (row["std"], row["law"]) == (std, law)}
            cells.append(f"{own[16]['rmse']:.2g}, {own[error.FEATURES[-1]]['rmse']:.2g}")
        lines.append(f"| {law} | {' | '.join(cells)} |")
    sizes = {row["std"]: row["output_rms"] for row in found["outputs"]}
    lines.append(f"| the exact output itself | {' | '.join(f'{sizes[std]:.2g}' for std in error.STDS)} |")
    lines += ["", "| error of an entry, orthogonal / independent, m = d = 16 | "]
    lines[-1] += " | ".join(f"std {std}" for std in error.KERNEL_STDS) + " | measured before |"
    lines.append(f"|---|{'---|' * (len(error.KERNEL_STDS) + 1)}")
    for kernel in EARLIER_RATIOS:
        own = {row["std"]: row["ratio"] for row in found["entries"] if row["kernel"] == kernel}
        cells = [f"{own[std]:.2f}" for std in error.KERNEL_STDS]
        lines.append(f"| {kernel} | {' | '.join(cells)} | {EARLIER_RATIOS[kernel]} |")
        own = {row["std"]: row["independent"] / row["lemma"] for row in found["entries"] if row["kernel"] == kernel}
        cells = [f"{own[std]:.2f}" for std in error.KERNEL_STDS]
        lines.append(f"| {kernel}: independent, measured / Lemma 2 | {' | '.join(cells)} | |")
    lines += ["", "| denominators not above 0, std 1 | 16 features | 1,024 features |", "|---|---|---|"]
    for law in dict.fromkeys(row["law"] for row in found["signs"]):
        cells = [f"{row['bad']:,} of {row['rows']:,} rows" for row in found["signs"] if row["law"] == law]
        lines.append(f"| {law} | {' | '.join(cells)} |")
    return [*lines, ""]


def error_figure(found: Mapping[str, Any]) -> str:
    """One chart a standard deviation."""
    charts = []
    for std in error.STDS:
        lines = []
        for colour, law in enumerate(error.LAWS):
            own = [row for row in found["outputs"] if (row["std"], row["law"]) == (std, law)]
            lines.append(Line(law, [p["features"] for p in own], [p["rmse"] for p in own], colour, dots=True))
        first = lines[0]
        fall = [first.up[0] * (first.across[0] / x) ** 0.5 for x in first.across]
        lines.append(Line("1 / root of features", first.across, fall, 7, dashed=True))
        charts.append(Chart(f"std of q and k: {std}", "features", "error", lines, log_across=True, log_up=True))
    return draw(charts, columns=3)


# ---- conversion ----


def _complete(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The runs with all arms."""
    return [run for run in runs if len(run["arms"]) == len(conversion.ARMS)]


def longer(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each arm that was trained on for longer."""
    lines = []
    for run in runs:
        for arm, one in run["arms"].items() if len(run["arms"]) < len(conversion.ARMS) else ():
            looks = [look for look in one["curve"] if look["step"] % 50 == 0]
            told = ", ".join(f"{look['nats']:.3f} at {look['step']:.0f}" for look in looks)
            lines += [f"For longer: {arm}, seed {run['seed']}, from {run['base']['nats']:.3f}: {told}.", ""]
        if run.get("at_once_by_features"):
            told = ", ".join(f"{nats:.3f} with {m}" for m, nats in run["at_once_by_features"].items())
            lines += [f"At once, by the number of features, seed {run['seed']}: {told}.", ""]
    return lines


def recovered_at(run: Mapping[str, Any], arm: str) -> int | None:
    """The first look at which an arm is as good as the softmax model was before; None: not within the run."""
    curve = run["arms"][arm]["curve"]
    return next((int(look["step"]) for look in curve if look["nats"] <= run["base"]["nats"]), None)


def conversion_table(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Before, at once after, and after further training; means over seeds with Student's 95 % interval."""
    steps, further = runs[0]["steps"], runs[0]["further"]
    lines = [
        f"| {len(runs)} seeds | nats per byte at once | next byte right at once | nats after {further} steps "
        "| right | back at the softmax model's level after, by seed | nats under rows never seen |",
        "|---|---|---|---|---|---|---|",
        f"| softmax, {steps} steps | {_mean([r['base']['nats'] for r in runs])} "
        f"| {_mean([r['base']['accuracy'] for r in runs])} | | | | |",
    ]
    for arm in conversion.ARMS:
        own = [run["arms"][arm] for run in runs]
        first, last = ([arm["curve"][place] for arm in own] for place in (0, -1))
        back = [recovered_at(run, arm) for run in runs]
        unseen = [one["other_draws"] for one in own]
        cells = [
            arm,
            _mean([look["nats"] for look in first]),
            _mean([look["accuracy"] for look in first]),
            _mean([look["nats"] for look in last]),
            _mean([look["accuracy"] for look in last]),
            ", ".join("not" if step is None else f"{step}" for step in back),
            "" if None in unseen else _mean(unseen),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| after the further steps, paired by seed | nats |", "|---|---|"]
    for arm, other in (
        ("performer, rows held", "softmax, trained on"),
        ("performer, redrawn", "softmax, trained on"),
        ("performer, redrawn", "performer, rows held"),
    ):
        gaps = [r["arms"][arm]["curve"][-1]["nats"] - r["arms"][other]["curve"][-1]["nats"] for r in runs]
        lines.append(f"| {arm}, less {other} | {_mean(gaps, signed=True)} |")
    return [*lines, ""]


def _mean(values: Sequence[float], *, signed: bool = False) -> str:
    mean, half = mean_half(values)
    text = f"{mean:+.3f}" if signed else f"{mean:.3f}"
    return text if half is None else f"{text} ± {half:.3f}"


def conversion_figure(runs: Sequence[Mapping[str, Any]]) -> str:
    """Nats by further step: the mean over seeds, and their range."""
    lines = []
    for colour, arm in enumerate(conversion.ARMS):
        curves = [run["arms"][arm]["curve"] for run in runs]
        steps = [look["step"] for look in curves[0]]
        nats = [[curve[i]["nats"] for curve in curves] for i in range(len(steps))]
        lines.append(
            Line(
                arm,
                steps,
                [sum(x) / len(x) for x in nats],
                colour,
                dots=True,
                low=[min(x) for x in nats],
                high=[max(x) for x in nats],
            )
        )
    level = sum(run["base"]["nats"] for run in runs) / len(runs)
    lines.append(Line("softmax before", [0, lines[0].across[-1]], [level] * 2, 7, dashed=True))
    return draw([Chart("held-out nats per byte", "further step", "nats per byte", lines)], columns=1)


# ---- length ----


def length_table() -> list[str]:
    """Time per token out of the newest `benchmarks/length.py`; nothing where there is none."""
    files = sorted(BENCHMARKS.glob("length-cpu-*.json"))
    if not files:
        return []
    found = json.loads(files[-1].read_text())["results"]
    lengths = [1024 << i for i in range(7)]
    lines = [
        "### Time by length",
        "",
        f"From [{files[-1].name}](../../benchmarks/results/{files[-1].name}): microseconds per ",
    ]
    lines[-1] += "token of a forward pass, 2 heads of 64, one thread, the least of five."
    lines += ["", f"| | {' | '.join(f'{n // 1024}k' for n in lengths)} | 64k / 8k | faster than sdpa from |"]
    lines.append(f"|---|{'---|' * (len(lengths) + 2)}")
    for name in ("sdpa causal", "performer causal", "sdpa", "performer"):
        own = found[name]["forward"]["microseconds_per_token"]
        factor = found[name].get("time_per_token_64k_over_8k")
        cells = [f"{own[str(n)]:.1f}" if str(n) in own else "-" for n in lengths]
        cells += ["-" if factor is None else f"{factor:.2f}", found[name]["forward"]["crossing"] or "-"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
