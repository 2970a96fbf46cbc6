"""Counts to rates with exact intervals, tables, and the sentences above them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from clearhead.compare import statistics as st
from experiments.calibration.trials import AGAIN, CURVATURES, POWER, PROMISED, SEEDS
from experiments.calibration.worlds import ALIKE, UNLIKE

SURE = 0.999
"""A rate is said to break a promise only when its interval at this confidence does: there are many rates here."""


def exact(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact (Clopper-Pearson) binomial interval."""
    found = stats.binomtest(hits, trials).proportion_ci(confidence, "exact")
    return float(found.low), float(found.high)


def pooled(runs: Sequence[Mapping[str, Any]], *, fresh: bool = False) -> list[dict[str, Any]]:
    """Add up the parts of each case; every count gets its rate and its interval. `fresh`: of the repeated draws."""
    runs = [run for run in runs if (run["part"] >= AGAIN) == fresh]
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in runs:
        key = tuple(run[name] for name in ("kind", "world", "arms", "seeds"))
        row = cases.setdefault(
            key, dict(zip(("kind", "world", "arms", "seeds"), key, strict=True)) | {"trials": 0, "counts": {}}
        )
        row["trials"] += run["trials"]
        for name, count in run["counts"].items():
            row["counts"][name] = row["counts"].get(name, 0) + count
    for row in cases.values():
        row["rates"] = {}
        for name, count in row["counts"].items():
            low, high = exact(count, row["trials"])
            sure_low, sure_high = exact(count, row["trials"], SURE)
            row["rates"][name] = {
                "rate": count / row["trials"], "low": low, "high": high, "sure_low": sure_low, "sure_high": sure_high
            }  # fmt: skip
    return list(cases.values())


def verdicts(
    rows: Sequence[Mapping[str, Any]], pool: Mapping[str, Any] | None, fresh: Sequence[Mapping[str, Any]] = ()
) -> list[str]:
    """What the page says first. `fresh`: cases that stood out, drawn anew."""
    lines = []
    promised = [
        (row, row["rates"]["called"]) for row in rows if row["kind"] in ("alike", "grid") and row["world"] in KEPT
    ]
    if promised:
        lines += [_held("made-up comparisons of equal arms", promised)]
    for row in fresh:
        lines.append(
            f"Its 95 % interval lay above 5 % for {_where(row)}. Among so many cases some do by luck, so "
            f"{row['trials']:,} fresh comparisons were drawn of it: called different in "
            f"{_rate(row['rates']['called'])}."
        )
    before = [row["rates"]["called_before"] for row in rows if row["kind"] == "grid" and row["world"] in KEPT]
    if before:
        worst = max(before, key=lambda rate: rate["rate"])
        lines.append(
            f"What was mended: with a grid of learning rates, and before a verdict had to hold at one rate too, equal "
            f"arms were called different in up to {_rate(worst)} of comparisons."
        )
    power = [row for row in rows if row["kind"] == "power" and row["world"] == "normal"]
    if power:
        printed = [row["rates"]["printed"] for row in power]
        naive = [row["rates"]["naive"] for row in power]
        short = [rate for rate in printed if rate["sure_high"] < POWER]
        lines.append(
            f"Power: the effect that a comparison prints, planted in another one, was found in {_span(printed)} of "
            f"comparisons (promised: {POWER:.0%}{'' if not short else '; NOT kept'}). Before the uncertainty of the "
            f"spread was reckoned in, the smaller effect that was printed was found in {_span(naive)}. The printed one "
            f"is now {', '.join(f'{_growth(n):.2f} times as large with {n} seeds' for n in SEEDS)}."
        )
    boot = [row["rates"] for row in rows if row["kind"] == "bootstrap"]
    if boot:
        lines.append(
            f"The bootstrap interval that stands beside Student's from 8 seeds, and that no verdict uses, is narrower "
            f"than it says: it missed the truth in {_span([rates['misses'] for rates in boot])}, Student's in "
            f"{_span([rates['students'] for rates in boot])} (stated: {PROMISED:.0%})."
        )
    if pool is None:
        return [*lines, "The pool of real runs has too few seeds yet."]
    rates = [*pool["start"], *pool["rounding"]]
    broken = [rate for rate in rates if rate["low"] > PROMISED]
    kept = "every interval reaches down to 5 % or below"
    if broken:
        kept = f"{len(broken)} of {len(rates)} intervals lie above 5 %"
    found = f" The printed effect, planted, was found in {_span(pool['planted'])}." if pool["planted"] else ""
    lines.append(
        f"Real runs ({pool['runs']} of them, {pool['seeds']} seeds): equal arms were called different in "
        f"{_span(rates)} of the comparisons drawn; {kept}.{found}"
    )
    same = pool["identical"]
    if same is not None:
        lines.append(
            f"One configuration under two names ended equal to the last bit (largest difference {same['largest']:g} "
            f"over {same['seeds']} seeds) and the verdict was: {same['verdict']}."
        )
    return lines


def _growth(seeds: int) -> float:
    """The printed effect, by that which takes the estimated spread for the true one; two arms."""
    now, before = st.detectable_effect(1.0, seeds, sd_df=seeds - 1), st.detectable_effect(1.0, seeds)
    assert now is not None
    assert before is not None
    return now / before


KEPT = {*ALIKE, *map(str, CURVATURES)}
"""Worlds in which the arms are truly equal."""


def _held(what: str, found: Sequence[tuple[Mapping[str, Any], Mapping[str, float]]]) -> str:
    worst_row, worst = max(found, key=lambda one: one[1]["rate"])
    broken = [row for row, rate in found if rate["sure_low"] > PROMISED]
    trials = sum(row["trials"] for row, _ in found)
    kept = "none lies" if not broken else f"NOT KEPT: {len(broken)} lie"
    return (
        f"{trials:,} {what}, {len(found)} cases: {kept} above {PROMISED:.0%} beyond its {SURE:.1%} interval. "
        f"The highest rate is {_rate(worst)} ({_where(worst_row)})."
    )


def _where(row: Mapping[str, Any]) -> str:
    return f"{row['world']}, {row['arms']} arms, {row['seeds']} seeds"


def _rate(rate: Mapping[str, float]) -> str:
    return f"{rate['rate']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})"


def _span(rates: Sequence[Mapping[str, float]]) -> str:
    values = [rate["rate"] for rate in rates]
    return f"{min(values):.1%} to {max(values):.1%}" if len(values) > 1 else f"{values[0]:.1%}"


def tables(rows: Sequence[Mapping[str, Any]], pool: Mapping[str, Any] | None) -> list[str]:
    """Markdown."""
    lines = ["### Equal arms, made up: how often is any arm called better or worse?", ""]
    lines += _by_seeds(rows, "alike", 4, "called", "four arms (three comparisons at once)")
    lines += ["", "| luck | 2 arms | 3 arms | 4 arms | 6 arms |", "|---|---|---|---|---|"]
    for world in ("normal", "skewed", "heavy tails"):
        cells = [_cell(_find(rows, "alike", world, arms, 5), "called") for arms in (2, 3, 4, 6)]
        lines.append(f"| {world}, 5 seeds | {' | '.join(cells)} |")
    lines += ["", "### Equal arms that choose from a grid of five learning rates on two tuning seeds", ""]
    lines += [
        "| loss of the neighbouring rate, in sd of a run | arms | seeds | chose alike | called, before | called, now |",
        "|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if row["kind"] == "grid"):
        lines.append(
            f"| {row['world']} | {row['arms']} | {row['seeds']} | {row['rates']['chose_alike']['rate']:.0%} | "
            f"{_cell(row, 'called_before')} | {_cell(row, 'called')} |"
        )
    lines += [
        "",
        "What the check at one rate costs: one arm truly better by what two arms at one rate show 80 % of the time",
        "",
    ]
    lines += ["| loss of the neighbouring rate | seeds | found, before | found, now |", "|---|---|---|---|"]
    lines += [
        f"| {row['world']} | {row['seeds']} | {_cell(row, 'better_before')} | {_cell(row, 'better')} |"
        for row in rows
        if row["kind"] == "grid power"
    ]
    lines += ["", "### Planted effects, made up: how often are they called better?", ""]
    lines += [
        "| luck | arms | seeds | the effect printed | as printed before | if the spread were known |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['world']} | {row['arms']} | {row['seeds']} | {_cell(row, 'printed')} | {_cell(row, 'naive')} | "
        f"{_cell(row, 'known')} |"
        for row in rows
        if row["kind"] == "power"
    ]
    lines += ["", "### Beyond the promise: equal means, unlike shapes (two arms)", ""]
    lines += _by_seeds(rows, "unlike", 2, "called", "luck", worlds=UNLIKE)
    lines += ["", "### The bootstrap interval that stands beside: how often does it miss the truth?", ""]
    lines += ["| luck | seeds | bootstrap | Student |", "|---|---|---|---|"]
    lines += [
        f"| {row['world']} | {row['seeds']} | {_cell(row, 'misses')} | {_cell(row, 'students')} |"
        for row in rows
        if row["kind"] == "bootstrap"
    ]
    return lines if pool is None else [*lines, "", *_pool_tables(pool)]


def _pool_tables(pool: Mapping[str, Any]) -> list[str]:
    luck = pool["luck"]
    lines = [
        f"### Real runs: {pool['runs']} of {pool['steps']} steps, {pool['seeds']} seeds, "
        f"{pool['cpu_seconds'] / 60:.0f} CPU minutes",
        "",
        f"A run ends at {luck['level']:.3f} bits per byte, with a standard deviation of {luck['sd_run']:.4f} between "
        f"runs of an arm and {luck['sd_difference']:.4f} ({luck['relative_sd_difference']:.2%}) between the two runs "
        f"of a pair (correlation of a seed's arms {luck['correlation']:.2f}, excess kurtosis of the differences "
        f"{luck['excess_kurtosis']:.1f}). Rounding alone moves the end by at most {luck['rounding']:.1g}.",
        "",
        "| equal arms that differ in | arms | seeds | called, of comparisons drawn (jackknife) | called, of those that "
        "share nothing (exact) |",
        "|---|---|---|---|---|",
    ]
    for what in ("start", "rounding"):
        for row in pool[what]:
            low, high = exact(row["apart_called"], row["apart"])
            lines.append(
                f"| {what} | {row['arms']} | {row['n']} | {_rate(row)} | "
                f"{row['apart_called']} of {row['apart']} ({low:.0%} to {high:.0%}) |"
            )
    lines += ["", "| planted in real runs | seeds | found (jackknife) | foretold |", "|---|---|---|---|"]
    lines += [
        f"| the effect that another comparison printed | {row['n']} | {_rate(row)} | 80% |" for row in pool["planted"]
    ]
    lines += [
        f"| 0.7 times the learning rate ({row['effect']:+.3f} bits) | {row['n']} | {_rate(row)} | "
        f"{row['foretold']:.0%} |"
        for row in pool["lower_rate"]
    ]
    return lines


def _by_seeds(
    rows: Sequence[Mapping[str, Any]], kind: str, arms: int, name: str, heading: str, worlds: Mapping[str, Any] = ALIKE
) -> list[str]:
    seeds = sorted({row["seeds"] for row in rows if row["kind"] == kind and row["arms"] == arms})
    lines = [f"| {heading} | " + " | ".join(f"{n} seeds" for n in seeds) + " |", "|---" * (len(seeds) + 1) + "|"]
    for world, draw in worlds.items():
        cells = [_cell(_find(rows, kind, world, arms, n), name) for n in seeds]
        about = (draw.__doc__ or "").strip().rstrip(".")
        lines.append(f"| {world}: {about[:1].lower()}{about[1:]} | {' | '.join(cells)} |")
    return lines


def _find(rows: Sequence[Mapping[str, Any]], *wanted: Any) -> Mapping[str, Any] | None:
    return next((r for r in rows if (r["kind"], r["world"], r["arms"], r["seeds"]) == wanted), None)


def _cell(row: Mapping[str, Any] | None, name: str) -> str:
    return "" if row is None else _rate(row["rates"][name])
