"""Tables and figures of both parts, from the runs alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clearhead.compare.statistics import Interval
from clearhead.compare.verdict import Comparison
from experiments import equal_rate
from experiments.admin import amplification as grow
from experiments.admin import translation as talk
from experiments.admin.chart import Chart, Line, draw
from experiments.admin.laws import fit
from experiments.running import mean_half

Runs = Sequence[Mapping[str, Any]]

BEFORE = {
    "Post-LN": {6: "1.6 to 1.9", 50: "6.9 to 20", 200: "24 to 46"},
    "Pre-LN": {6: "1.3 to 1.5", 50: "4.0 to 4.9", 200: "5.5 to 11.8"},
    "Admin, profiled": {},
    "constant omega, O(log n)": {6: "0.7", 50: "1.4 to 1.8", 200: "2.0 to 2.5"},
    "constant omega, O(1)": {6: "0.31 to 0.34", 50: "0.34 to 0.36", 200: "0.34 to 0.37"},
}
"""Measured by us before, in other code: noise 0.01, d = 64, three seeds."""
TOLD = "0.85 to 1.07"
"""Likewise: profiled Admin over Pre-LN, at every depth."""


def geometric(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Geometric mean and Student's 95 % interval of it: for changes, whose seeds differ by factors."""
    mean, half = mean_half([math.log(value) for value in values])
    return math.exp(mean), *((None, None) if half is None else (math.exp(mean - half), math.exp(mean + half)))


def ranged(triple: Sequence[float | None]) -> str:
    """Geometric mean and interval as text."""
    mean, low, high = triple
    return f"{mean:.3g}" if low is None or high is None else f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def said(pair: Sequence[float | None], digits: int = 3) -> str:
    """Mean and interval as text."""
    mean, half = pair
    if mean is None:
        return "-"
    return f"{mean:.{digits}g}" if half is None else f"{mean:.{digits}g} ± {half:.2g}"


# ---- (a) amplification ----


PREDICTED = ("shares_predicted", "change_predicted")
FLAT = 1.1
"""Below this factor between the largest and the smallest mean neither law is named."""


def amplification(runs: Runs) -> dict[str, Any]:
    """Means over seeds by scheme and depth, and the laws that they follow."""
    rows, laws = [], []
    for scheme in grow.SCHEMES:
        own = [run for run in runs if run["scheme"] == scheme]
        depths = sorted({run["sublayers"] for run in own})
        for depth in depths:
            here = [run for run in own if run["sublayers"] == depth]
            rows.append(
                {"scheme": scheme, "sublayers": depth, "seeds": len(here)}
                | {name: geometric([run[name] for run in here]) for name in ("change", "small")}
                | {name: mean_half([run[name] for run in here]) for name in ("shares", *PREDICTED)}
            )
        if len(depths) < 3:
            continue
        for name in ("change", "small", "shares", "shares_predicted"):
            means = [row[name][0] for row in rows if row["scheme"] == scheme]
            by_seed = [
                fit(depths, [run[name] for run in sorted(own, key=lambda one: one["sublayers"]) if run["seed"] == seed])
                for seed in sorted({run["seed"] for run in own})
            ]
            whole = fit(depths, means)
            better = "flat" if max(means) < FLAT * min(means) else whole.better
            laws.append(
                {"scheme": scheme, "quantity": name, **vars(whole), "better": better}
                | {"seeds": len(by_seed), "seeds_log": sum(one.better == "log n" for one in by_seed)}
            )
    return {"rows": rows, "laws": laws}


def amplification_table(found: Mapping[str, Any]) -> list[str]:
    """Measured beside predicted and what was measured before, then the fits."""
    table = [
        "| scheme | sub-layers | change, noise 0.01 | measured before | change, tiny noise (scaled) | change predicted "
        "| sum of beta_ii² measured | predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        table.append(
            f"| {row['scheme']} | {row['sublayers']} | {ranged(row['change'])} "
            f"| {BEFORE[row['scheme']].get(row['sublayers'], '')} | {ranged(row['small'])} "
            f"| {row['change_predicted'][0]:.3g} | {said(row['shares'])} | {row['shares_predicted'][0]:.3g} |"
        )
    ratios = _ratios(found["rows"])
    if ratios:
        said_ratios = ", ".join(f"{ratio:.2f} ({depth})" for depth, ratio in ratios.items())
        table += ["", f"Profiled Admin over Pre-LN, noise 0.01, by sub-layers: {said_ratios}. Measured before: {TOLD}."]
    if not found["laws"]:
        return table
    table += [
        "",
        "| scheme | quantity | R² of a + b ln n | R² of a + b n | better | seeds for ln n | exponent of n |",
        "|---|---|---|---|---|---|---|",
    ]
    words = {
        "change": "change, noise 0.01",
        "small": "change, tiny noise",
        "shares": "sum of beta_ii², measured",
        "shares_predicted": "sum of beta_ii², predicted",
    }
    for law in found["laws"]:
        table.append(
            f"| {law['scheme']} | {words[law['quantity']]} | {law['log_r2']:.3f} | {law['linear_r2']:.3f} "
            f"| {law['better'].replace('log n', 'ln n')} | {law['seeds_log']} of {law['seeds']} "
            f"| {law['exponent']:.2f} |"
        )
    return table


def _ratios(rows: Runs) -> dict[int, float]:
    by = {(row["scheme"], row["sublayers"]): row["change"][0] for row in rows}
    depths = [depth for scheme, depth in by if scheme == "Pre-LN"]
    return {depth: by["Admin, profiled", depth] / by["Pre-LN", depth] for depth in depths}


def amplification_figure(found: Mapping[str, Any]) -> str:
    """The change and the sum of shares by depth; measured with dots, predicted dashed."""
    change: list[Line] = []
    shares: list[Line] = []
    for colour, scheme in enumerate(grow.SCHEMES):
        rows = [row for row in found["rows"] if row["scheme"] == scheme]
        depths = [row["sublayers"] for row in rows]
        for lines, measured, predicted in (
            (change, "small", "change_predicted"),
            (shares, "shares", "shares_predicted"),
        ):
            found_here = [_band(row[measured]) for row in rows]
            middle, low, high = (list(values) for values in zip(*found_here, strict=True))
            lines.append(Line(scheme, depths, middle, colour, dots=True, low=low, high=high))
            lines.append(
                Line("predicted", depths, [row[predicted][0] for row in rows], colour, dashed=True, listed=colour == 0)
            )
    axes: dict[str, Any] = {"across": "sub-layers", "log_across": True, "log_up": True}
    return draw(
        [
            Chart("squared change of the output, tiny noise", up="change, scaled to noise 0.01", lines=change, **axes),
            Chart("sum of the branches' shares", up="sum of beta_ii²", lines=shares, **axes),
        ]
    )


def _band(values: Sequence[float | None]) -> tuple[float, float, float]:
    """Middle, low and high of a mean with its interval, of either kind."""
    mean = values[0] or 0.0
    if len(values) == 2:
        half = values[1] or 0.0
        return mean, mean - half, mean + half
    return mean, values[1] or mean, values[2] or mean


# ---- (b) translation ----


def translation(
    runs: Runs,
    chosen: Mapping[str, float],
    *,
    plateaus: Mapping[str, float],
    expected: Mapping[str, Any],
    setting: Mapping[str, Any],
) -> dict[str, Any]:
    """The choice of rates, the chosen runs of every seed, and the verdicts on test nats and chrF."""
    kept = [run for run in runs if run["lr"] == chosen[run["arm"]]]
    arms = []
    for arm in talk.ARMS:
        own = [run for run in kept if run["arm"] == arm]
        arms.append(
            {
                "arm": arm,
                "lr": chosen[arm],
                "seeds": len(own),
                "status": [run["status"] for run in own],
                "test": _of([run["test"] for run in own]),
                "chrf": _of([run["chrf"] for run in own]),
                "best_seed_test": min((run["test"] for run in own if run["test"] is not None), default=None),
                "worst_seed_test": max((run["test"] for run in own if run["test"] is not None), default=None),
            }
        )
    return {
        "setting": dict(setting),
        "plateaus": dict(plateaus),
        "expected": dict(expected),
        "fingerprint": sorted({run["fingerprint"] for run in runs}),
        "chrf_signature": sorted({run["signature"] for run in runs if run["signature"]}),
        "tuning": [
            {"arm": run["arm"], "lr": run["lr"], "val": run["val"], "status": run["status"]}
            for run in runs
            if run["seed"] == 0
        ],
        "arms": arms,
        "verdicts": _verdicts(runs, chosen),
        "curves": [{"arm": run["arm"], "seed": run["seed"], "curve": run["curve"]} for run in kept],
        "cpu_seconds_of_all_runs": round(sum(run["cpu_seconds"] for run in runs)),
    }


def _of(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None]
    return mean_half(known) if known else (None, None)


PAIRS = (("Post-LN", ("Post-LN with Admin", "Pre-LN")), ("Pre-LN", ("Post-LN with Admin",)))
"""Baseline and candidates; intervals are simultaneous within a baseline."""


def wanted(runs: Runs, chosen: Mapping[str, float]) -> list[tuple[str, float]]:
    """The arms, and the rates of others, at which a verdict waits for runs or rests on them."""
    return equal_rate.wanted(found for *_, found in _compared(runs, chosen))


def _compared(runs: Runs, chosen: Mapping[str, float]) -> list[tuple[str, float, str, str, Comparison]]:
    """Quantity, its sign, baseline, arm, and how they compare; what is judged is the quantity times its sign."""
    seeds = sorted({run["seed"] for run in runs if run["lr"] == chosen[run["arm"]]})
    answer = []
    for name, sign in (("test", 1.0), ("chrf", -1.0)):
        judged = [
            equal_rate.Run(
                run["arm"], run["lr"], run["seed"], run["status"], None if run[name] is None else sign * run[name]
            )
            for run in runs
        ]
        ledger = equal_rate.Ledger(judged, chosen, seeds)
        for baseline, others in PAIRS:
            for arm, found in ledger.against(baseline, others).items():
                answer.append((name, sign, baseline, arm, found))
    return answer


def _verdicts(runs: Runs, chosen: Mapping[str, float]) -> list[dict[str, Any]]:
    """Paired over seeds. chrF is turned round for the comparison, which takes lower as better, and back again."""
    answer = []
    for name, sign, baseline, arm, found in _compared(runs, chosen):
        check = found.equal_rate
        if check is not None and check.mean is not None:
            check = dataclasses.replace(check, mean=sign * check.mean, interval=_turned(check.interval, sign))
        turned = _turned(found.interval, sign)
        answer.append(
            {
                "quantity": name,
                "arm": arm,
                "baseline": baseline,
                "verdict": str(found.verdict),
                "equal_rate": equal_rate.plain(check),
                "mean": None if found.mean is None else sign * found.mean,
                "interval": None if turned is None else [turned.low, turned.high],
                "seeds": len(found.seeds),
                "p_holm": found.p_holm,
                "detectable": found.detectable,
            }
        )
    return answer


def _turned(interval: Interval | None, sign: float) -> Interval | None:
    if interval is None:
        return None
    low, high = sorted((sign * interval.low, sign * interval.high))
    return dataclasses.replace(interval, low=low, high=high)


def translation_table(found: Mapping[str, Any]) -> list[str]:
    """Test scores, the tuning, and the verdicts in words."""
    table = [
        "| arm | learning rate | test nats per token | chrF | theory says, before training |",
        "|---|---|---|---|---|",
    ]
    for row in found["arms"]:
        theory = found["expected"][row["arm"]]
        shares = ", ".join(f"{stack} {value:.1f}" for stack, value in theory["shares"].items())
        table.append(
            f"| {row['arm']} | {row['lr']:g} | {said(row['test'], 4)} | {said(row['chrf'])} "
            f"| {theory['verdict']} (sum of shares: {shares}) |"
        )
    table += ["", f"Token frequencies alone: {found['plateaus']['test']:.3f} nats on the test pairs.", ""]
    rates = sorted({run["lr"] for run in found["tuning"]})
    table += [
        "| validation nats, seed 0 | " + " | ".join(f"{lr:g}" for lr in rates) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for arm in talk.ARMS:
        cells = [
            next((_number(run["val"]) for run in found["tuning"] if (run["arm"], run["lr"]) == (arm, lr)), "-")
            for lr in rates
        ]
        table.append(f"| {arm} | " + " | ".join(cells) + " |")
    table.append("")
    for one in found["verdicts"]:
        what = "test nats per token" if one["quantity"] == "test" else "chrF"
        if one["interval"] is None or one["mean"] is None:
            table.append(f"- {one['arm']} against {one['baseline']}, {what}: {one['verdict']} ({one['seeds']} seeds).")
            continue
        low, high = one["interval"]
        difference = f"{one['mean']:+.3g} [{low:+.3g}, {high:+.3g}]"
        check = one["equal_rate"]
        verdict = equal_rate.words(one["verdict"], check, 3)
        line = f"- {one['arm']} against {one['baseline']}, {what}: {difference}: **{verdict}**"
        if check is not None and check["holds"]:
            line += f" (holds with {equal_rate.at_one_rate(check, 3)})"
        elif check is None and one["detectable"] is not None:
            line += f" (80 % power for {one['detectable']:.2g})"
        table.append(line + ".")
    return table


def _number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.3f}"


def translation_figure(found: Mapping[str, Any]) -> str:
    """Validation loss by step: the mean over seeds, and the range of the seeds."""
    lines = []
    for colour, arm in enumerate(talk.ARMS):
        curves = [np.asarray(one["curve"], float) for one in found["curves"] if one["arm"] == arm]
        steps = curves[0][:, 0]
        values = np.stack([curve[:, 1] for curve in curves if len(curve) == len(steps)])
        lines.append(
            Line(
                arm,
                steps.tolist(),
                values.mean(0).tolist(),
                colour,
                dots=True,
                low=values.min(0).tolist(),
                high=values.max(0).tolist(),
            )
        )
    first, last = lines[0].across[0], lines[0].across[-1]
    lines.append(Line("token frequencies alone", [first, last], [found["plateaus"]["val"]] * 2, 7, dashed=True))
    return draw([Chart("validation loss at the chosen rates", "step", "nats per token", lines)], columns=1)


TABLES = {"amplification": amplification_table, "translation": translation_table}


def page(results: Mapping[str, Any]) -> list[str]:
    """What stands between the README's marks."""
    lines: list[str] = []
    if "amplification" in results:
        lines += ["### (a) Amplification", "", "![growth of the change with depth](results/amplification.svg)", ""]
        lines += [*amplification_table(results["amplification"]), ""]
    if "translation" in results:
        lines += ["### (b) Translation, 18 + 18 layers", "", "![validation loss](results/translation.svg)", ""]
        lines += translation_table(results["translation"])
    return lines


def figures(results: Mapping[str, Any]) -> dict[str, str]:
    """File name -> SVG."""
    answer = {}
    if "amplification" in results:
        answer["amplification.svg"] = amplification_figure(results["amplification"])
    if "translation" in results:
        answer["translation.svg"] = translation_figure(results["translation"])
    return answer
