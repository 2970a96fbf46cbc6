"""From runs to tables, verdicts and the figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clearhead.compare import statistics as st
from experiments.admin.chart import Chart, Line, draw
from experiments.bmi.runs import ARMS, BASE, FULL, LONGER, PLAIN, TWO_PHASES
from experiments.running import mean_half

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Quantity:
    """What the arms are judged by."""

    name: str
    words: str
    read: Callable[[Run], float]
    better: int
    """-1 = lower is better, 1 = higher."""


QUANTITIES = (
    Quantity("first", "nats of the first tokens of a next segment", lambda run: run["first_nats"], -1),
    Quantity("bits", "test bits per byte", lambda run: run["test_bits_per_byte"], -1),
    Quantity("accuracy", "accuracy of a fresh critic", lambda run: run["information"]["accuracy"], 1),
    Quantity("nwj", "information by a fresh critic (NWJ), nats", lambda run: run["information"]["nwj"], 1),
)
AGAINST = (
    ("BMI-base 0.1", PLAIN),
    ("BMI-base 1", PLAIN),
    (LONGER, PLAIN),
    ("BMI-base 0.1", LONGER),
    (FULL, BASE),
)


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def results(runs: Sequence[Run]) -> dict[str, Any]:
    """Summaries of arms and differences, by corpus."""
    answer: dict[str, Any] = {"arms": [], "differences": []}
    for corpus in dict.fromkeys(run["corpus"] for run in runs):
        own = [run for run in runs if run["corpus"] == corpus and run["status"] == "finished"]
        by_arm = {arm: {run["seed"]: run for run in own if run["arm"] == arm} for arm in ARMS}
        by_arm = {arm: found for arm, found in by_arm.items() if found}
        rows = [_summary(corpus, arm, list(found.values())) for arm, found in by_arm.items()]
        on_top = {row["arm"]: row["extra_tokens_per_step"] for row in rows}
        for row in rows:
            each = row["extra_tokens_per_step"]
            if row["arm"] == FULL:  # its first half was BMI-base
                each = (each + on_top.get(BASE, each)) / 2
            row["tokens_on_top"] = round(each * row["steps"])
        answer["arms"] += rows
        pairs = [(a, b) for a, b in AGAINST if a in by_arm and b in by_arm]
        for a, b in pairs:
            for quantity in QUANTITIES:
                answer["differences"].append(
                    _difference(corpus, a, b, quantity, by_arm[a], by_arm[b], comparisons=len(pairs))
                )
    answer["failed"] = [
        [run["corpus"], run["arm"], run["seed"], run["status"]] for run in runs if run["status"] != "finished"
    ]
    return answer


def _summary(corpus: str, arm: str, runs: Sequence[Run]) -> dict[str, Any]:
    measures = {quantity.name: list(mean_half([quantity.read(run) for run in runs])) for quantity in QUANTITIES}
    for name in ("mean_score", "info_nce", "donsker_varadhan"):
        measures[name] = list(mean_half([run["information"][name] for run in runs]))
    own = [run["own_critic_accuracy"] for run in runs if run["own_critic_accuracy"] is not None]
    curves = [run["curve"] for run in runs if run["arm"] not in TWO_PHASES]
    return {
        "corpus": corpus,
        "arm": arm,
        "seeds": len(runs),
        "steps": runs[0]["steps"],
        "tokens": runs[0]["tokens"],
        "extra_tokens_per_step": runs[0]["extra_tokens_per_step"],
        "cpu_seconds": mean([run["cpu_seconds"] for run in runs]),
        "own_accuracy": list(mean_half(own)) if own else None,
        "effective_pairs": _effective([run["effective_pairs"] for run in runs if run["effective_pairs"]]),
        "scored_pairs": runs[0]["information"]["pairs"],
        "curve": [[point[0] for point in curves[0]], np.mean([[y for _, y in curve] for curve in curves], 0).tolist()]
        if curves
        else None,
        **measures,
    }


def _effective(found: Sequence[Sequence[float]]) -> list[float] | None:
    return [min(low for low, _ in found), mean([middle for _, middle in found])] if found else None


def _difference(
    corpus: str, a: str, b: str, quantity: Quantity, of_a: Mapping[int, Run], of_b: Mapping[int, Run], comparisons: int
) -> dict[str, Any]:
    seeds, d = st.paired_differences(
        {seed: quantity.read(run) for seed, run in of_a.items()},
        {seed: quantity.read(run) for seed, run in of_b.items()},
    )
    interval = st.student_interval(d, comparisons=comparisons)
    detectable = None
    if interval is not None:
        detectable = st.detectable_effect(float(d.std(ddof=1)), len(d), comparisons=comparisons, sd_df=len(d) - 1)
    return {
        "corpus": corpus,
        "arm": a,
        "against": b,
        "quantity": quantity.name,
        "seeds": len(seeds),
        "mean": float(d.mean()) if len(d) else None,
        "interval": interval and [interval.low, interval.high],
        "comparisons": comparisons,
        "detectable": detectable,
        "verdict": _verdict(interval, quantity.better),
    }


def _verdict(interval: st.Interval | None, better: int) -> str:
    if interval is None:
        return "not judged"
    if interval.low > 0 or interval.high < 0:
        return "better" if (interval.low > 0) == (better > 0) else "worse"
    return "no difference shown at this size"


# ---- tables ----


def page(found: Mapping[str, Any]) -> list[str]:
    """What stands between the README's marks."""
    known = found["known"]
    return [
        "![validation bits per byte by step](results/topics.svg)",
        "",
        f"Known of the topics: one segment tells {known['information']:.2f} nats about the next. Who knows the laws "
        f"and has read the segment before needs {known['best_nats']:.3f} nats a token for the first four of the next; "
        f"after shuffling, {known['best_nats_shuffled']:.3f}. These are floors.",
        "",
        *_arm_table(found["arms"]),
        "",
        *_difference_table(found["differences"]),
        *(["", f"Runs that did not finish: {found['failed']}."] if found["failed"] else []),
    ]


def _arm_table(rows: Sequence[Run]) -> list[str]:
    table = [
        "| corpus | arm | seeds | steps | LM tokens | tokens on top | CPU s | first tokens, nats | test bits per byte "
        "| own critic right | fresh critic right | NWJ | InfoNCE | E[T] | effective pairs, least and mean |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own = "-" if row["own_accuracy"] is None else _share(row["own_accuracy"])
        effective = "-" if row["effective_pairs"] is None else "{:.1f}, {:.1f}".format(*row["effective_pairs"])
        table.append(
            f"| {row['corpus']} | {row['arm']} | {row['seeds']} | {row['steps']} | {row['tokens']:,} "
            f"| {row['tokens_on_top']:,} | {row['cpu_seconds']:.0f} | {_number(row['first'])} | {_number(row['bits'])} "
            f"| {own} | {_share(row['accuracy'])} | {_number(row['nwj'], 2)} | {_number(row['info_nce'], 2)} "
            f"| {_number(row['mean_score'], 2)} | {effective} |"
        )
    return table


def _difference_table(rows: Sequence[Run]) -> list[str]:
    words = {quantity.name: quantity.words for quantity in QUANTITIES}
    table = [
        "| corpus | arm | against | quantity | difference | interval | verdict | seen with 80 % power |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        interval = "-" if row["interval"] is None else "{:+.4f} to {:+.4f}".format(*row["interval"])
        detectable = "-" if row["detectable"] is None else f"{row['detectable']:.4f}"
        table.append(
            f"| {row['corpus']} | {row['arm']} | {row['against']} | {words[row['quantity']]} | {row['mean']:+.4f} "
            f"| {interval} | **{row['verdict']}** | {detectable} |"
        )
    return table


def _number(pair: Sequence[float | None], digits: int = 4) -> str:
    middle, half = pair
    return f"{middle:.{digits}f}" + ("" if half is None else f" ± {half:.2g}")


def _share(pair: Sequence[float | None]) -> str:
    middle, half = pair
    assert middle is not None
    return f"{middle:.1%}" + ("" if half is None else f" ± {half:.1%}")


def figure(found: Mapping[str, Any]) -> str:
    """Validation bits per byte by step, a chart for each corpus."""
    charts = []
    for corpus in dict.fromkeys(row["corpus"] for row in found["arms"]):
        rows = [row for row in found["arms"] if row["corpus"] == corpus and row["curve"]]
        lines = [
            Line(row["arm"], row["curve"][0], row["curve"][1], list(ARMS).index(row["arm"]), dots=True) for row in rows
        ]
        charts.append(Chart(corpus, "step", "validation bits per byte", lines))
    return draw(charts)
