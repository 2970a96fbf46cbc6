"""results.json -> docs/moment-formulas.md and its pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.moment_formulas.case import TARGETS, Case, percentile
from experiments.moment_formulas.figure import Panel, scatter_row

WORST = 3
"""Points shown for a quantity that misses its target."""


@dataclass(frozen=True)
class Fit:
    """How well one quantity of one formula agrees; shares, not per cent."""

    case: str
    quantity: str
    points: int
    p50: float
    p90: float
    p99: float
    noise: float
    """Median of the simulation's own error."""
    targets: tuple[float, float]

    @property
    def judged(self) -> bool:
        """Whether there is a bar: a target of 100 % or more is none."""
        return self.targets[0] < 1.0

    @property
    def met(self) -> bool:
        """Whether median and 90th percentile are below the targets."""
        return self.p50 < self.targets[0] and self.p90 < self.targets[1]


def fits(cases: Sequence[Case], results: Mapping[str, Any]) -> list[Fit]:
    """Percentiles of every case and quantity in the results."""
    found = []
    for case in cases:
        for quantity in case.quantities:
            columns = results[case.name]["quantities"][quantity]
            p50, p90, p99 = (percentile(columns["error"], share) for share in (0.5, 0.9, 0.99))
            noise = percentile(columns["noise"], 0.5)
            targets = case.targets.get(quantity, TARGETS)
            found.append(Fit(case.name, quantity, len(columns["error"]), p50, p90, p99, noise, targets))
    return found


HEAD = """# Every formula against simulation

Written by `python -m experiments.moment_formulas.run`; do not edit. The formulas live in `clearhead/signal/moments/`,
the experiment and its verdict in [experiments/moment_formulas](../experiments/moment_formulas/README.md), the
derivations in [pointwise-moments.md](pointwise-moments.md) and [attention-moments.md](attention-moments.md).

**{met} of {total} quantities of {cases} formulas meet their target over {points} sampled points**: a median error below
2 % and a 90th percentile below 5 %, or the two in brackets in the last column. Published formulas that stand here for
comparison with ours are not judged.

How to read the table:

- A point is drawn uniformly, without repetition, from the full factorial grid of a formula's inputs. The grids keep the
  ranges of the authors' own simulations (DeepScaleLM, arXiv 2403.09635, repository `akhilkedia/TranformersGetStable`)
  where these are known; the notes say where not.
- A point is simulated with fresh Gaussian inputs of the given mean, variance and token correlation, fresh weights, and
  an independent gradient from above; the loss is <output, gradient>, and autograd does the rest. The simulation knows
  no formula.
- **error** = |simulated - predicted| / max(|simulated|, reference): the reference of a variance is the prediction, of a
  covariance the predicted variance of the same thing, of a mean the predicted standard deviation. It is the authors'
  measure ("relative to the predicted variance if that is smaller"), but for the mean, where theirs is the variance.
- **noise** is the median of what the simulation itself adds: the standard error over two independent replicas, in the
  same measure. An error that is not larger than that says nothing against the formula.
- **authors** is what the authors' own scripts report (p50 / p90 / p99), for their grid
  and their number of samples.

| formula | quantity | points | p50 % | p90 % | p99 % | noise % | authors % | target met |
|---|---|---|---|---|---|---|---|---|
"""

PICTURES = """
## Formula by formula

Predicted (across) against simulated (up), both axes alike; the line is equality. Sizes have logarithmic axes. Means are
shown over the predicted standard deviation and covariances over the predicted variance, on linear axes.
"""


def write_page(path: Path, cases: Sequence[Case], results: Mapping[str, Any]) -> None:
    """Write the page, and one picture per formula beside it."""
    found = fits(cases, results)
    points = sum(len(results[case.name]["points"]) for case in cases)
    judged = [fit for fit in found if fit.judged]
    met = sum(fit.met for fit in judged)
    text = HEAD.format(met=met, total=len(judged), cases=len(cases), points=f"{points:,}")
    text += "\n".join(_row(fit, next(case for case in cases if case.name == fit.case)) for fit in found) + "\n"
    missed = [fit for fit in judged if not fit.met]
    text += "\n## What misses its target\n\n" + ("".join(_missed(fit, results) for fit in missed) or "Nothing.\n")
    pictures = path.parent / "images" / "moment-formulas"
    pictures.mkdir(parents=True, exist_ok=True)
    text += PICTURES
    for case in cases:
        own = [fit for fit in found if fit.case == case.name]
        file = re.sub("[^a-z0-9]+", "-", case.name.lower()).strip("-") + ".svg"
        (pictures / file).write_text(_picture(own, results[case.name]))
        text += f"\n### {case.name}\n\n{case.note}\n\nGrid: {_grid(case)}.\n\n"
        text += f"![predicted against simulated: {case.name}](images/moment-formulas/{file})\n"
    path.write_text(text)


def _row(fit: Fit, case: Case) -> str:
    authors = case.published.get(fit.quantity)
    theirs = " / ".join(f"{value:g}" for value in authors) if authors else ""
    numbers = " | ".join(f"{100 * value:.2f}" for value in (fit.p50, fit.p90, fit.p99, fit.noise))
    said = ("yes" if fit.met else "**no**") if fit.judged else "not judged"
    if fit.judged and fit.targets != TARGETS:
        said += " (" + " / ".join(f"{100 * value:g}" for value in fit.targets) + ")"
    return f"| {fit.case} | {fit.quantity.replace('_', ' ')} | {fit.points} | {numbers} | {theirs} | {said} |"


def _missed(fit: Fit, results: Mapping[str, Any]) -> str:
    case = results[fit.case]
    columns = case["quantities"][fit.quantity]
    order = sorted(range(fit.points), key=lambda index: -columns["error"][index])[:WORST]
    lines = [f"- **{fit.case}, {fit.quantity.replace('_', ' ')}**; the worst points:\n"]
    for index in order:
        where = ", ".join(f"{name} {value:g}" for name, value in zip(case["params"], case["points"][index]))
        said = f"predicted {columns['predicted'][index]:g}, simulated {columns['simulated'][index]:g}"
        lines.append(f"  - {100 * columns['error'][index]:.1f} %: {said} at {where}\n")
    return "".join(lines)


def _grid(case: Case) -> str:
    def values(name: str) -> str:
        return ", ".join(f"{round(value, 3):g}" for value in case.grid[name])

    return "; ".join(f"{name} in {{{values(name)}}}" for name in case.grid)


def _picture(own: Sequence[Fit], result: Mapping[str, Any]) -> str:
    panels = []
    for fit in own:
        columns = result["quantities"][fit.quantity]
        caption = f"p50 {100 * fit.p50:.2g} %, p90 {100 * fit.p90:.2g} %"
        title, units = _units(fit.quantity, result)
        across = [value / unit for value, unit in zip(columns["predicted"], units)]
        up = [value / unit for value, unit in zip(columns["simulated"], units)]
        panels.append(Panel(title, caption, across, up, ratio=title != fit.quantity.replace("_", " ")))
    return scatter_row(panels)


def _units(quantity: str, result: Mapping[str, Any]) -> tuple[str, list[float]]:
    """A covariance is shown as a correlation and a mean in deviations, where the results have the variance."""
    name = quantity.replace("_", " ")
    for suffix, shown, power in (("covariance", "correlation", 1.0), ("mean", "mean / deviation", 0.5)):
        if quantity.endswith(suffix):
            for variance in (quantity.removesuffix(suffix) + "variance", "variance"):
                if variance in result["quantities"]:
                    predicted = result["quantities"][variance]["predicted"]
                    return name.removesuffix(suffix) + shown, [value**power or 1.0 for value in predicted]
    return name, [1.0] * len(result["points"])
