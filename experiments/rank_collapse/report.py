"""Tables, from the runs alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from clearhead.compare.statistics import student_interval
from clearhead.signal.watch import COLLAPSED, SATURATED, SHARP
from experiments.admin.report import said
from experiments.rank_collapse import initial, training
from experiments.running import mean_half

Run = Mapping[str, Any]
Runs = Sequence[Run]


def results(first: Runs, trained: Runs, entropies: tuple[float, float]) -> dict[str, Any]:
    """Everything that README and figures show. `entropies`: of a byte alone, and after the byte before it."""
    return {
        "entropies": entropies,
        "depth": _depth(first),
        "fixed_points": _fixed(first),
        "scores": _scores(first),
        "training": _training(trained, entropies),
        "losses": _losses(trained),
    }


# ---- at initialisation ----


def _depth(runs: Runs) -> list[dict[str, Any]]:
    """By arm, depth and dropout: the correlation at the end, and the largest mean error over the layers."""
    rows = []
    for dropout in initial.DROPOUTS:
        for arm in initial.ARMS:
            of_arm = [run for run in runs if run["kind"] == "correlation" and run["arm"] == arm]
            for layers in sorted({run["layers"] for run in of_arm}):
                own = [run for run in of_arm if run["layers"] == layers and run["dropout"] == dropout]
                if not own:
                    continue
                measured, predicted = (_mean(own, name, "correlation") for name in ("measured", "predicted"))
                rows.append(
                    {
                        "arm": arm,
                        "layers": layers,
                        "dropout": dropout,
                        "seeds": len(own),
                        "end": mean_half([run["measured"]["correlation"][-1] for run in own]),
                        "end_predicted": mean_half([run["predicted"]["correlation"][-1] for run in own])[0],
                        "largest_error": float(np.abs(measured - predicted).max()),
                        "left": mean_half([1 - run["measured"]["correlation"][-1] for run in own])[0],
                        "left_predicted": mean_half([1 - run["predicted"]["correlation"][-1] for run in own])[0],
                        "measured": _list(measured),
                        "predicted": _list(predicted),
                        "low": _list(np.min([run["measured"]["correlation"] for run in own], axis=0)),
                        "high": _list(np.max([run["measured"]["correlation"] for run in own], axis=0)),
                    }
                )
    return rows


def _fixed(runs: Runs) -> list[dict[str, Any]]:
    rows = []
    for dropout, published in initial.FIXED_POINTS.items():
        own = [run for run in runs if run["kind"] == "fixed point" and run["dropout"] == dropout]
        if own:
            ends = [mean_half([run[name]["correlation"][-1] for run in own]) for name in ("measured", "predicted")]
            rows.append({"dropout": dropout, "derived": published, "measured": ends[0], "predicted": ends[1][0]})
    return rows


QUANTITIES = ("score_variance", "entropy", "largest_weight", "jacobian_gain", "query_over_value")


def _scores(runs: Runs) -> list[dict[str, Any]]:
    """By arm and strength: means over the layers, and the measured over the predicted by layer."""
    rows = []
    for arm in initial.ARMS:
        for strength in initial.STRENGTHS:
            own = [run for run in runs if (run["kind"], run["arm"], run["strength"]) == ("scores", arm, strength)]
            if not own:
                continue
            row: dict[str, Any] = {"arm": arm, "strength": strength, "seeds": len(own)}
            for name in QUANTITIES:
                measured, predicted = _mean(own, "measured", name), _mean(own, "predicted", name)
                row[name] = {
                    "measured": mean_half([float(np.mean(run["measured"][name])) for run in own]),
                    "predicted": float(predicted.mean()),
                    "first": [float(measured[0]), float(predicted[0])],
                    "last": [float(measured[-1]), float(predicted[-1])],
                    "by_layer": [_list(measured), _list(predicted)],
                    "worst": float(np.exp(np.abs(np.log(measured / predicted)).max())),
                }
            rows.append(row)
    return rows


def _mean(runs: Runs, source: str, name: str) -> np.ndarray:
    return np.mean([run[source][name] for run in runs], axis=0)


def _list(values: Any) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


# ---- in training ----


def _training(runs: Runs, entropies: tuple[float, float]) -> list[dict[str, Any]]:
    """By learning rate and arm. Learned: a tenth of the way between the two entropies, as in the trainability grid."""
    alone, after_one = entropies
    limit = alone - 0.1 * (alone - after_one)
    rows = []
    for lr in training.RATES:
        for arm in training.ARMS:
            own = [run for run in runs if run["arm"] == arm and run["lr"] == lr]
            if own:
                learned = sum(run["loss"] is not None and run["loss"] < limit for run in own)
                rows.append({"arm": arm, "lr": lr, "seeds": len(own), "learned": learned} | _one_arm(own))
    return rows


PAIRS = (
    ("Pre-LN, strong scores", "Pre-LN"),
    ("Pre-LN, strong scores, QK-norm", "Pre-LN, strong scores"),
    ("Pre-LN, DeepScaleLM", "Pre-LN"),
)


def _losses(runs: Runs) -> list[dict[str, Any]]:
    """Differences of loss, paired by seed, with Student's intervals that hold for all of them together."""
    loss = {(run["arm"], run["lr"], run["seed"]): run["loss"] for run in runs if run["loss"] is not None}
    answer = []
    for arm, baseline in PAIRS:
        for lr in training.RATES:
            seeds = [seed for name, rate, seed in loss if (name, rate) == (arm, lr) and (baseline, lr, seed) in loss]
            differences = np.array([loss[arm, lr, seed] - loss[baseline, lr, seed] for seed in seeds])
            interval = student_interval(differences, comparisons=len(PAIRS) * len(training.RATES))
            verdict = "not judged"
            if interval is not None:
                verdict = "worse" if interval.low > 0 else "better" if interval.high < 0 else "no difference shown"
            answer.append(
                {
                    "arm": arm,
                    "baseline": baseline,
                    "lr": lr,
                    "mean": float(differences.mean()) if len(seeds) else None,
                    "interval": None if interval is None else [interval.low, interval.high],
                    "verdict": verdict,
                }
            )
    return answer


def _loss_lines(rows: Runs) -> list[str]:
    lines = []
    for row in rows:
        words = f"- {row['arm']} against {row['baseline']}, lr {row['lr']:g}, loss"
        if row["interval"] is not None:
            low, high = row["interval"]
            words += f" {row['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append(f"{words}: **{row['verdict']}**.")
    return lines


def _one_arm(runs: Runs) -> dict[str, Any]:
    known = [run["loss"] for run in runs if run["loss"] is not None]
    sound = [run for run in runs if _sound(run)]
    whole = [run["looks"] for run in sound]
    return {
        "verdict": sorted({run["predicted"]["verdict"] for run in runs}),
        "findings": sorted({finding for run in runs for finding in run["predicted"]["findings"]}),
        "loss": mean_half(known) if known else (None, None),
        "diverged": len(runs) - len(known),
        "collapse_predicted": _where(sound, lambda run: run["predicted"]["correlation"], _collapsed),
        "collapse_start": _where(whole, lambda one: one[0]["correlation"], _collapsed),
        "collapse_end": _where(whole, lambda one: one[-1]["correlation"], _collapsed),
        "correlation_predicted": _over(runs, lambda run: max(run["predicted"]["correlation"])),
        "correlation_start": _over(whole, lambda one: max(one[0]["correlation"])),
        "correlation_end": _over(whole, lambda one: max(one[-1]["correlation"])),
        "scores_predicted": _over(runs, lambda run: max(run["predicted"]["score_variance"])),
        "scores_start": _over(whole, lambda one: max(one[0]["score_variance"])),
        "scores_end": _over(whole, lambda one: max(one[-1]["score_variance"])),
        "entropy_predicted": _over(runs, lambda run: min(run["predicted"]["entropy"])),
        "entropy_start": _over(whole, lambda one: min(one[0]["entropy"])),
        "entropy_end": _over(whole, lambda one: min(one[-1]["entropy"])),
        "rank_scores_start": _ranks(sound, "score_variance", 0),
        "rank_scores_end": _ranks(sound, "score_variance", -1),
        "rank_correlation_end": _ranks(sound, "correlation", -1),
        "steps": [look["step"] for look in runs[0]["looks"]],
        "by_step": _worst_by_step(whole),
        "layers_end": {
            name: _list(np.mean([one[-1][name] for one in whole], axis=0))
            for name in ("correlation", "score_variance", "entropy")
        }
        if whole
        else {},
        "layers_predicted": {
            name: _list(np.mean([run["predicted"][name] for run in runs], axis=0))
            for name in ("correlation", "score_variance", "entropy")
        },
    }


WORST: dict[str, Callable[[Sequence[float]], float]] = {"correlation": max, "score_variance": max, "entropy": min}


def _worst_by_step(looks: Sequence[Any]) -> dict[str, list[float | None]]:
    """The worst layer of each look, mean over runs that could be measured to the end."""
    if not looks:
        return {}
    answer: dict[str, list[float | None]] = {}
    for name, worst in WORST.items():
        by_run = [[worst(look[name]) for look in run] for run in looks]
        answer[name] = [mean_half(values)[0] for values in zip(*by_run, strict=True)]
    return answer


def _sound(run: Run) -> bool:
    """Whether the run stayed finite and could be measured at every look."""
    return run["loss"] is not None and all("problem" not in look and None not in _flat(look) for look in run["looks"])


def _flat(look: Run) -> list[float | None]:
    return [value for name in ("correlation", "score_variance", "entropy") for value in look[name]]


def _over(items: Sequence[Any], read: Callable[[Any], float]) -> tuple[float | None, float | None]:
    return mean_half([read(item) for item in items]) if items else (None, None)


def _collapsed(values: Sequence[float]) -> int | None:
    """First layer whose stream has lost its tokens, by the threshold of `clearhead.signal.watch`."""
    return next((layer for layer, value in enumerate(values) if value > COLLAPSED), None)


def _where(items: Sequence[Any], read: Callable[[Any], Sequence[float]], first: Callable[..., int | None]) -> list[Any]:
    return [first(read(item)) for item in items]


def _ranks(runs: Runs, name: str, place: int) -> float | None:
    """Spearman's correlation over the layers, of what was predicted at the start with what is measured at `place`."""
    found = [float(stats.spearmanr(run["predicted"][name], run["looks"][place][name]).statistic) for run in runs]
    known = [value for value in found if math.isfinite(value)]
    return sum(known) / len(known) if known else None


def confusion(rows: Runs) -> dict[str, dict[str, int]]:
    """Runs that stayed finite, by what was predicted at the start and what was measured at the end, for collapse."""
    answer = {said: {"collapsed": 0, "not": 0} for said in ("collapse", "no collapse")}
    for row in rows:
        for before, after in zip(row["collapse_predicted"], row["collapse_end"]):
            key = "no collapse" if before is None else "collapse"
            answer[key]["not" if after is None else "collapsed"] += 1
    return answer


# ---- tables ----


def page(found: Mapping[str, Any]) -> list[str]:
    """What stands between the README's marks."""
    return [
        "### Token correlation by depth, at initialisation",
        "",
        "![token correlation by depth](results/correlation.svg)",
        "",
        *depth_table(found["depth"]),
        "",
        *fixed_table(found["fixed_points"]),
        "",
        "### Attention scores, at initialisation",
        "",
        "![score variance and entropy by layer](results/scores.svg)",
        "",
        *score_table(found["scores"]),
        "",
        "### In training",
        "",
        "![correlation, scores and entropy by step](results/training.svg)",
        "",
        "A byte alone has {:.3f} nats, after the byte before it {:.3f}.".format(*found["entropies"]),
        "",
        *training_table(found["training"]),
        "",
        *_loss_lines(found["losses"]),
    ]


def depth_table(rows: Runs) -> list[str]:
    table = [
        "| arm | layers | dropout | correlation at the end, measured | predicted | 1 - correlation, measured "
        "| predicted | largest error over the layers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        table.append(
            f"| {row['arm']} | {row['layers']} | {row['dropout']:g} | {_near_one(row['end'])} "
            f"| {row['end_predicted']:.4f} | {_left(row['left'])} | {_left(row['left_predicted'])} "
            f"| {row['largest_error']:.3f} |"
        )
    return table


def _left(value: float) -> str:
    return f"{value:.2g}" if value > 1e-5 else "< 1e-5"  # correlations are kept with five digits


def _near_one(pair: Sequence[float | None]) -> str:
    mean, half = pair
    assert mean is not None
    return f"{mean:.4f}" + ("" if half is None else f" ± {half:.2g}")


def fixed_table(rows: Runs) -> list[str]:
    table = ["| dropout | fixed point of the recursion (derived) | `signal.predict` | measured |", "|---|---|---|---|"]
    for row in rows:
        table.append(
            f"| {row['dropout']:g} | {row['derived']:.3f} | {row['predicted']:.3f} | {said(row['measured'])} |"
        )
    return table


def score_table(rows: Runs) -> list[str]:
    table = [
        "| arm | score std asked for | score variance | entropy / uniform | largest weight | softmax Jacobian "
        "| query / value gradient | worst layer (variance, entropy) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{said(row[name]['measured'])} ({row[name]['predicted']:.3g})" for name in QUANTITIES]
        worst = f"{row['score_variance']['worst']:.2f}, {row['entropy']['worst']:.2f}"
        table.append(f"| {row['arm']} | {row['strength']:g} | " + " | ".join(cells) + f" | {worst} |")
    return table


def training_table(rows: Runs) -> list[str]:
    table = [
        "| arm | lr | theory | loss | learned | correlation: predicted, start, end | first layer above "
        f"{COLLAPSED:g}: predicted, end | score variance: predicted, start, end | entropy / uniform: predicted, start, "
        "end | order of the layers' scores: start, end |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        loss = said(row["loss"]) + (f", {row['diverged']} diverged" if row["diverged"] else "")
        table.append(
            f"| {row['arm']} | {row['lr']:g} | {' / '.join(row['verdict'])} "
            f"| {loss} | {row['learned']} of {row['seeds']} "
            f"| {_three(row, 'correlation', 4)} | {_layers(row['collapse_predicted'])}; {_layers(row['collapse_end'])} "
            f"| {_three(row, 'scores', 3)} | {_three(row, 'entropy', 2)} "
            f"| {_sign(row['rank_scores_start'])}, {_sign(row['rank_scores_end'])} |"
        )
    counts = confusion(rows)
    sharp = [f"{row['arm']} at {row['lr']:g}" for row in rows if (row["scores_end"][0] or 0.0) > SHARP]
    flat = [f"{row['arm']} at {row['lr']:g}" for row in rows if (row["entropy_end"][0] or 1.0) < SATURATED]
    return [
        *table,
        "",
        "| theory at the start | collapsed at the end | not |",
        "|---|---|---|",
        *(f"| {name} | {row['collapsed']} | {row['not']} |" for name, row in counts.items()),
        "",
        f"Score variance above {SHARP:g} at the end (mean over seeds): {', '.join(sharp) or 'none'}. Entropy below "
        f"{SATURATED:g} of the uniform: {', '.join(flat) or 'none'}.",
    ]


def _three(row: Run, name: str, digits: int) -> str:
    parts = [row[f"{name}_{when}"][0] for when in ("predicted", "start", "end")]
    return ", ".join("-" if value is None else f"{value:.{digits}g}" for value in parts)


def _layers(layers: Sequence[int | None]) -> str:
    words = sorted({"none" if layer is None else str(layer) for layer in layers}, key=lambda word: (len(word), word))
    return "/".join(words) or "-"


def _sign(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
