"""Tables and the figure, from the runs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clearhead.compare.verdict import Comparison
from experiments import equal_rate
from experiments.admin.chart import Chart, Line, draw
from experiments.positions import lengths as task
from experiments.running import mean_half

Runs = Sequence[Mapping[str, Any]]


def said(pair: Sequence[float | None], digits: int = 3, *, sign: bool = False) -> str:
    """Mean and half of the interval as text."""
    mean, half = pair
    assert mean is not None
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    return text if half is None else f"{text} ± {half:.{digits}f}"


def rates(runs: Runs) -> dict[str, Any]:
    """Validation bits per byte of each arm at each rate, and the rate that was taken."""
    rows = []
    for arm in task.ARMS:
        own = {run["rate"]: run["val"] for run in runs if run["arm"] == arm}
        if own:
            rows.append({"arm": arm, "val": {str(rate): own[rate] for rate in sorted(own)}})
    return {"rows": rows, "taken": task.best_rates([dict(run) for run in runs])}


def scores(runs: Runs, again: Runs = ()) -> dict[str, Any]:
    """Bits per byte by arm and context, the change from the training context, and each arm against the baseline.

    again: runs at a rate that another arm chose; they hold verdicts in check and count nowhere else.
    """
    rows = []
    for arm in task.ARMS:
        own = sorted((run for run in runs if run["arm"] == arm and run["test"]), key=lambda run: run["seed"])
        if not own:
            continue
        at = {length: [run["test"][length] for run in own] for length in own[0]["test"]}
        first, *_, last = at
        rows.append(
            {
                "arm": arm,
                "rate": own[0]["rate"],
                "parameters": own[0]["parameters"],
                "seeds": len(own),
                "test": {length: mean_half(values) for length, values in at.items()},
                "change": mean_half([b - a for a, b in zip(at[first], at[last], strict=True)]),
                "by_seed": at,
                "train_seconds": min(run["train_seconds"] for run in own),
                "cpu_seconds": round(sum(run["train_seconds"] + run["score_seconds"] for run in own)),
            }
        )
    verdicts = {
        name: [{"arm": arm, "verdict": str(each.verdict), "sentence": each.sentence} for arm, each in judged.items()]
        for name, judged in _compared(runs, again).items()
    }
    scored = next((run["scored"] for run in runs if run["scored"]), None)
    return {"rows": rows, "verdicts": verdicts, "scored": scored}


def wanted(runs: Runs, again: Runs = ()) -> list[tuple[str, float]]:
    """The arms, and the rates of others, at which a verdict waits for runs or rests on them."""
    return equal_rate.wanted(each for judged in _compared(runs, again).values() for each in judged.values())


def _compared(runs: Runs, again: Runs) -> dict[str, dict[str, Comparison]]:
    """Every arm against the baseline: at the shortest context, at the longest, and by the change between them."""
    chosen = {arm: run["rate"] for arm in task.ARMS for run in runs if run["arm"] == arm}
    scored = {arm: [run for run in runs if run["arm"] == arm and run["test"]] for arm in chosen}
    if task.BASELINE not in chosen or any(len(own) < 2 for own in scored.values()):
        return {}
    first, *_, last = scored[task.BASELINE][0]["test"]

    def change(run: Mapping[str, Any]) -> float:
        return float(run["test"][last] - run["test"][first])

    made = {}
    for name, value in (
        (first, lambda run: run["test"][first]),
        (last, lambda run: run["test"][last]),
        ("change", change),
    ):
        judged = [
            equal_rate.Run(run["arm"], run["rate"], run["seed"], run["status"], value(run) if run["test"] else None)
            for run in [*runs, *again]
        ]
        ledger = equal_rate.Ledger(judged, chosen, sorted({run["seed"] for run in runs}))
        made[name] = ledger.against(task.BASELINE, [arm for arm in chosen if arm != task.BASELINE])
    return made


def rates_table(found: Mapping[str, Any]) -> list[str]:
    """One row for each arm."""
    heads = list(dict.fromkeys(rate for row in found["rows"] for rate in row["val"]))
    lines = [
        "| validation bits per byte at rate | " + " | ".join(heads) + " | taken |",
        "|---|" + "---|" * (len(heads) + 1),
    ]
    for row in found["rows"]:
        cells = [row["val"].get(rate) for rate in heads]
        told = " | ".join("diverged" if cell is None else f"{cell:.3f}" for cell in cells)
        lines.append(f"| {row['arm']} | {told} | {found['taken'].get(row['arm'], 'none')} |")
    return lines


def scores_table(found: Mapping[str, Any]) -> list[str]:
    """One row for each arm, then the verdicts."""
    if not found["rows"]:
        return ["No run has finished."]
    contexts = list(found["rows"][0]["test"])
    first, last = contexts[0], contexts[-1]
    lines = [
        f"Test bits per byte by context, on the same {found['scored']['tokens']:,} tokens of "
        f"{found['scored']['documents']} documents; trained at {first}.",
        "",
        "| positions | parameters | training, CPU s | seeds | " + " | ".join(contexts) + f" | {last} less {first} |",
        "|---|---|---|---|" + "---|" * (len(contexts) + 1),
    ]
    for row in found["rows"]:
        cells = " | ".join(said(row["test"][context]) for context in contexts)
        change = said(row["change"], sign=True)
        lines.append(
            f"| {row['arm']} | {row['parameters']:,} | {row['train_seconds']} | {row['seeds']} | {cells} | {change} |"
        )
    titles = {first: f"At context {first}", last: f"At context {last}", "change": f"Change from {first} to {last}"}
    for name, title in titles.items():
        if found["verdicts"].get(name):
            lines += ["", f"{title}, against {task.BASELINE}:", ""]
            lines += [f"- {verdict['sentence']}" for verdict in found["verdicts"][name]]
    return lines


def figure(found: Mapping[str, Any]) -> str:
    """Bits per byte over context: all arms, and those that end within a tenth of the best."""
    charts = []
    ends = [list(row["test"].values())[-1][0] for row in found["rows"]]
    limit = 1.1 * min(ends)
    for title, kept in (("all", found["rows"]), ("those within a tenth of the best at the longest context", [
        row for row, end in zip(found["rows"], ends, strict=True) if end <= limit
    ])):  # fmt: skip
        lines = []
        for row in kept:
            colour = list(task.ARMS).index(row["arm"])
            means = [pair[0] for pair in row["test"].values()]
            halves = [pair[1] or 0.0 for pair in row["test"].values()]
            low = [m - h for m, h in zip(means, halves, strict=True)]
            high = [m + h for m, h in zip(means, halves, strict=True)]
            across = [float(context) for context in row["test"]]
            lines.append(Line(row["arm"], across, means, colour, dots=True, low=low, high=high))
        charts.append(Chart(title, "context", "test bits per byte", lines, True))
    return draw(charts)


def page(results: Mapping[str, Any]) -> list[str]:
    """What stands between the README's marks."""
    lines = []
    if "scores" in results:
        lines += ["### By context", "", "![bits per byte by context](results/lengths.svg)", ""]
        lines += [*scores_table(results["scores"]), ""]
    if "rates" in results:
        lines += ["### Learning rates", "", *rates_table(results["rates"])]
    return lines
