"""Tables and figures of the Self-Adjust experiment, from what the parts left."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from clearhead.compare.verdict import Comparison
from experiments.admin.chart import Chart, Line, draw
from experiments.running import mean_half
from experiments.self_adjust import jacobian, judge
from experiments.self_adjust.arms import BASELINE, DEFAULT, DETACHED, EXPLAINING, FORMS, MAIN
from experiments.self_adjust.text import FORMS_PLAN, LONG_PLAN

COLOURS = {name: index for index, name in enumerate((BASELINE, "product", "min_shift", "minmax", DEFAULT))}
SHOWN_GAPS = (0, 8, 16, 24)

Found = Mapping[str, Any]


def page(results: Mapping[str, Any]) -> list[str]:
    """What stands between the README's marks."""
    lines: list[str] = []
    if results.get("jacobian"):
        lines += ["### (a) Jacobians", "", "![size of the Jacobian](results/jacobian.svg)", ""]
        lines += [*jacobian_tables(results["jacobian"]), ""]
    if results.get("text"):
        lines += [
            "### (b) Text",
            "",
            "![validation less softmax's](results/text.svg)",
            "",
            *text_tables(results["text"]),
        ]
    if results.get("saturation"):
        lines += ["", "### (c) Saturation", "", "![saturation by step](results/saturation.svg)", ""]
        lines += saturation_tables(results["saturation"])
    return lines


def figures(results: Mapping[str, Any]) -> dict[str, str]:
    """File name -> SVG."""
    made = {}
    if results.get("jacobian"):
        made["jacobian.svg"] = jacobian_figure(results["jacobian"])
    if results.get("text"):
        made["text.svg"] = text_figure(results["text"])
    if results.get("saturation"):
        made["saturation.svg"] = saturation_figure(results["saturation"])
    return made


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *(f"| {' | '.join(row)} |" for row in rows)]


def _small(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e2:
        return f"{value:.2g}"
    return f"{value:,.0f}" if 1e2 <= abs(value) < 1e6 else f"{value:.0e}".replace("e-0", "e-").replace("e+", "e")


# ---- (a) ----


def jacobian_tables(found: Found) -> list[str]:
    """Saturation, its two parts, what starves, small scores, one key, rescue."""
    names = list(found["arms"])
    saturated = [
        [
            name,
            *(_small(jacobian.at(found, name, "positive", gap)) for gap in SHOWN_GAPS),
            _small(jacobian.at(found, name, "negative", 16)),
            _small(jacobian.at(found, name, "positive", 16, "row_sum")),
            _small(jacobian.at(found, name, "positive", 16, "shares")),
            _small(jacobian.at(found, name, "positive", 16, "starved")),
            jacobian.verdict(found, name),
        ]
        for name in names
    ]
    heads = [
        "Norm of the Jacobian, one score ahead by",
        *map(str, SHOWN_GAPS),
        "16, all below 0",
        "16: of the row sum",
        "16: of the shares",
        "16: of a starved token",
        "at one",
    ]
    lines = _table(heads, saturated)
    scales = found["scales"]
    small = [[name, *(_small(value) for value in found["arms"][name]["small"])] for name in names]
    lines += ["", *_table(["Norm by scale of 64 random scores", *(f"{scale:g}" for scale in scales)], small)]
    one = [[name, *(f"{_small(w)}, {_small(slope)}" for w, slope in found["arms"][name]["one_key"])] for name in names]
    heads = ["A row with one key: weight, and its derivative", *(f"score {score:g}" for score in jacobian.ONE_KEY)]
    lines += ["", *_table(heads, one)]
    steps = found["rescue_steps"]
    rescue = [
        [name, *(f"not in {steps:,}" if step is None else f"{step:,}" for step in found["arms"][name]["rescue"])]
        for name in names
    ]
    heads = ["Steps until a token is seen that is behind by", *(f"{gap:g}" for gap in jacobian.RESCUE_GAPS)]
    lines += ["", *_table(heads, rescue), ""]
    off = max(one["formula_off_by"] for one in found["arms"].values())
    lines.append(f"The package's gradients and the formulas on paper differ by {off:.0e} at most.")
    return lines


def jacobian_figure(found: Found) -> str:
    """Norms by gap and by scale; detached forms dashed."""
    specs = (
        ("Top score above 0", "positive", "norm"),
        ("Every score below 0", "negative", "norm"),
        ("Of the shares w / sum w, top score above 0", "positive", "shares"),
    )
    charts = []
    for title, sign, part in specs:
        lines = [_line(name, found["gaps"], [one[part] for one in arm[sign]]) for name, arm in found["arms"].items()]
        charts.append(
            Chart(title, "lead of the top score", "norm of the Jacobian", lines, log_up=True, limits=(1e-10, 10.0))
        )
    lines = [_line(name, found["scales"], arm["small"]) for name, arm in found["arms"].items()]
    charts.append(Chart("Small scores", "scale of the scores", "norm of the Jacobian", lines, True, True))
    return draw(charts)


def _line(name: str, across: Sequence[float], up: Sequence[float]) -> Line:
    return Line(name, across, up, COLOURS[name.split(",")[0]], dashed="detached" in name)


# ---- (b) ----


def text_tables(found: Found) -> list[str]:
    """A table for each comparison, then the verdicts and what they say of each explanation."""
    made = judge.families(found)
    lines: list[str] = []
    if FORMS_PLAN in found:
        both = made["forms"] | made["controls"]
        lines += _arms(f"{MAIN}, {found[FORMS_PLAN]['steps']} steps", found[FORMS_PLAN], both)
    others = {name: plan for name, plan in found.items() if name not in (FORMS_PLAN, LONG_PLAN)}
    for name, plan in others.items():
        lines += ["", *_arms(f"{name}, {plan['steps']} steps", plan, made[name])]
    if LONG_PLAN in found:
        lines += ["", *_arms(f"{MAIN}, {found[LONG_PLAN]['steps']} steps", found[LONG_PLAN], made[LONG_PLAN])]
    lines.append("")
    for row in judge.over_positions(found) if others else ():
        half = "" if row["half"] is None else f" ± {row['half']:.4f}"
        lines.append(
            f"- Over {', '.join(row['positions'])}, {row['seeds']} seeds: {row['arm']} less softmax is "
            f"{row['mean']:+.4f}{half} bits per byte{', each at the rate that it chose' if row['own_rates'] else ''}."
        )
    told = judge.explanations(found)
    return [*lines, "", "What explains it:", "", *(f"- {line}" for line in told)] if told else lines


def _arms(title: str, plan: Found, judged: Mapping[str, Comparison]) -> list[str]:
    rows = []
    for one in plan["arms"]:
        tests = list(one["tests"].values())
        mean, half = mean_half(tests) if tests else (float("nan"), None)
        compared = judged.get(one["name"])
        rows.append(
            [
                one["name"],
                f"{one['rate']:g}{' (edge)' if one['at_edge'] else ''}",
                f"{len(tests)} of {len(one['status'])}",
                f"{mean:.3f}{'' if half is None else f' ± {half:.3f}'}",
                "" if compared is None or compared.mean is None else f"{compared.mean:+.4f} {_interval(compared)}",
                "" if compared is None else judge.verdict(compared),
                _gradient(one["gradient"]),
                f"{one['speed']:.2f}" if one["speed"] else "",
            ]
        )
    heads = [
        title,
        "rate",
        "seeds",
        "test bits per byte",
        "less softmax",
        "verdict",
        "gradient: median, largest, spikes",
        "step, ratio",
    ]
    return _table(heads, rows)


def _interval(compared: Comparison) -> str:
    found = compared.interval
    return "" if found is None else f"[{found.low:+.4f}, {found.high:+.4f}]"


def _gradient(tails: Sequence[Mapping[str, float]]) -> str:
    if not tails:
        return ""
    middle = sorted(tail["median"] for tail in tails)[len(tails) // 2]
    return f"{_small(middle)}, {_small(max(tail['largest'] for tail in tails))}, {sum(int(t['spikes']) for t in tails)}"


def text_figure(found: Found) -> str:
    """Validation less softmax's by tokens, the mean over seeds; about range a band, its 95 % interval."""
    charts = []
    plan = found.get(FORMS_PLAN)
    if plan:
        charts.append(_changes(f"Forms, {MAIN}", plan, list(FORMS)))
        charts.append(_changes(f"Controls, {MAIN}", plan, [DEFAULT, *EXPLAINING], own_colours=True))
    for name, other in found.items():
        if name not in (FORMS_PLAN, LONG_PLAN):
            charts.append(_changes(name, other, [DEFAULT, DETACHED]))
    if LONG_PLAN in found:
        names = [one["name"] for one in found[LONG_PLAN]["arms"] if one["name"] != BASELINE]
        charts.append(_changes("Four times the steps", found[LONG_PLAN], names, own_colours=True))
    return draw(charts)


def _changes(title: str, plan: Found, names: Sequence[str], *, own_colours: bool = False) -> Chart:
    lines = []
    for name in [one for one in names if one in judge.arms_of(plan)]:
        rows = judge.changes(plan, name)
        if not rows:
            continue
        across, up = [row["tokens"] / 1000 for row in rows], [row["mean"] for row in rows]
        if own_colours and name != DEFAULT:
            place = list(EXPLAINING).index(name)
            lines.append(Line(name, across, up, place if place < COLOURS[DEFAULT] else place + 1, dots=True))
        elif name == DEFAULT:
            halves = [row["half"] or 0.0 for row in rows]
            low = [mean - half for mean, half in zip(up, halves, strict=True)]
            high = [mean + half for mean, half in zip(up, halves, strict=True)]
            lines.append(dataclasses.replace(_line(name, across, up), low=low, high=high))
        else:
            lines.append(_line(name, across, up))
    if not lines:
        lines = [Line("nothing finished", [0.0, 1.0], [0.0, 0.0], 7)]
    return Chart(title, "thousand tokens read", "validation bits per byte, less softmax's", lines)


# ---- (c) ----


def saturation_tables(found: Found) -> list[str]:
    """The trained models, then spikes and 1 / D."""
    rows = []
    for name, layers in found["final"].items():
        cells = []
        for field, form in (
            ("above_90", "{:.1%}"),
            ("above_99", "{:.1%}"),
            ("positive", "{:.0%}"),
            ("entropy", "{:.2f}"),
            ("score_sd", "{:.2f}"),
            ("row_sum", "{:.2f}"),
            ("row_sum_sd", "{:.2f}"),
        ):
            means = [layer[field][0] for layer in layers]
            cells.append(" / ".join("-" if mean is None else form.format(mean) for mean in means))
        rows.append([name, *cells])
    heads = [
        "trained model, by layer",
        "largest softmax weight above .9",
        "above .99",
        "of those above .9: top score above 0",
        "entropy / ln n",
        "sd of scores",
        "row sum",
        "its sd",
    ]
    lines = _table(heads, rows)
    spiking = [one for one in found["traced"] if one["spikes"]]
    rows = [
        [
            f"{one['arm']}, seed {one['seed']}",
            _small(one["spikes"]["median_norm"]),
            _small(one["spikes"]["largest_norm"]),
            str(one["spikes"]["spikes"]),
            _small(one["spikes"]["median_inverse"]),
            _small(one["spikes"]["largest_inverse"]),
            f"{one['spikes']['median_keys']:g}",
            "-" if one["spikes"]["correlation"] is None else f"{one['spikes']['correlation']:+.2f}",
            f"{one['spikes']['top_share']:.0%}",
        ]
        for one in spiking
    ]
    heads = [
        "gradient norm and 1 / D, by step",
        "norm, median",
        "largest",
        "spikes",
        "max 1 / D, median",
        "largest",
        "keys of its row",
        "rank correlation",
        "of the top 1 % of norms, in the top 10 % of 1 / D",
    ]
    return [*lines, "", *_table(heads, rows)] if rows else lines


def saturation_figure(found: Found) -> str:
    """By step and layer, the mean over seeds of the traced runs."""
    charts = []
    for field, title in (
        ("above_90", "Rows with a softmax weight above .9"),
        ("entropy", "Entropy of softmax / ln n"),
        ("row_sum", "Row sum"),
        ("score_sd", "Standard deviation of a row's scores"),
    ):
        lines = []
        for arm in dict.fromkeys(one["arm"] for one in found["traced"]):
            own = [one for one in found["traced"] if one["arm"] == arm]
            for layer in range(len(own[0]["layers"])):
                curves = [one["layers"][layer][field] for one in own]
                up = [_mean([value for value in values if value is not None]) for values in zip(*curves, strict=True)]
                colour = (COLOURS[arm.split(",")[0]] + ("detached" in arm)) % 8
                lines.append(Line(f"{arm}, layer {layer + 1}", own[0]["steps"], up, colour, dashed=layer > 0))
        charts.append(Chart(title, "step", "", lines))
    return draw(charts)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
