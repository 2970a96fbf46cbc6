"""Tables of every part, from the runs alone; claims stand below each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.running import mean_half
from experiments.selective import denoising, dilution, passkey, theory, token_generation
from experiments.selective.judge import lines as claim_lines

Run = Mapping[str, Any]
Column = tuple[str, Callable[[Run], float], int]


def said(values: Sequence[float], digits: int) -> str:
    """Mean and half of the 95 % interval."""
    if not values:
        return "-"
    mean, half = mean_half(values)
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def table(found: Mapping[str, Any], columns: Sequence[Column], setting: str = "", named: str = "") -> list[str]:
    """One row for each arm and setting."""
    heads = ["arm", *([setting] if setting else []), "rate", "seeds", *(name for name, _, _ in columns)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in found["rates"]:
        own = [run for run in found["runs"] if (run["arm"], run["setting"]) == (one["arm"], one["setting"])]
        done = [run for run in own if run["status"] == "finished"]
        if not own:
            continue
        cells = [said([value(run) for run in done], digits) for _, value, digits in columns]
        failed = f", {len(own) - len(done)} diverged" if len(done) < len(own) else ""
        where = [one["setting"]] if setting else []
        rate = f"{one['rate']:g}" + ("*" if one["at_edge"] and len(found["grid"]) > 1 else "")
        lines.append(f"| {' | '.join([one['arm'], *where, rate, f'{len(done)}{failed}', *cells])} |")
    if any(one["at_edge"] for one in found["rates"]) and len(found["grid"]) > 1:
        grid = ", ".join(f"{rate:g}" for rate in found["grid"])
        lines += ["", f"\\* at the edge of the grid {grid}."]
    return lines


def of_theory(rows: Sequence[Run]) -> list[str]:
    """Largest weight by length, measured."""
    lines = [
        f"| scores | slope | {' | '.join(f'{n:,} keys' for n in theory.LENGTHS)} |",
        "|---" * (2 + len(theory.LENGTHS)) + "|",
    ]
    for kind, name, digits in (("needle", "max_weight", 4), ("noise", "entropy", 2)):
        for slope in theory.SLOPES:
            own = {row["n"]: row for row in rows if (row["kind"], row["slope"]) == (kind, slope)}
            cells = []
            for n in theory.LENGTHS:
                formula = own[n]["formula"][name]
                cells.append(f"{own[n][name]:.{digits}f} ({formula:.{digits}f})")
            what = {"needle": f"a needle {theory.SCORE:g} above the rest, its weight", "noise": "N(0, 1), entropy"}[
                kind
            ]
            lines.append(f"| {what} | {slope:g} | {' | '.join(cells)} |")
    return [*lines, "", "In brackets: by the formula."]


def of_dilution(found: Mapping[str, Any]) -> list[str]:
    """Weight of the target and accuracy by length."""

    def at(n: int, name: str) -> Callable[[Run], float]:
        return lambda run: float(run["lengths"][str(n)][name])

    weights: list[Column] = [(f"target's weight, {n:,}", at(n, "target"), 3) for n in dilution.LENGTHS]
    right: list[Column] = [(f"right, {n:,}", at(n, "accuracy"), 3) for n in dilution.LENGTHS[1::2]]
    last = dilution.LENGTHS[-1]
    right.append((f"right, {last:,}", at(last, "accuracy"), 3))
    return table(found, [*weights, *right, ("‖W_q W_kᵀ‖", lambda run: float(run["norm"]), 1)])


def of_token_generation(found: Mapping[str, Any]) -> list[str]:
    """Excess, distance, norm and temperatures."""

    def tau(number: str) -> Callable[[Run], float]:
        return lambda run: float(run["temperatures"][number])

    columns: list[Column] = [
        ("excess, nats", lambda run: float(run["excess"]), 4),
        ("row l1", lambda run: float(run["l1"]), 3),
        ("‖W‖", lambda run: float(run["norm"]), 1),
        *((f"τ of {n} neighbours", tau(str(n)), 2) for n in sorted(set(token_generation.neighbours()))),
    ]
    return table(found, columns, "d, tokens")


def of_denoising(found: Mapping[str, Any]) -> list[str]:
    """Errors, and those of estimators that nothing trains."""
    columns: list[Column] = [
        (f"error, {denoising.L} tokens", lambda run: float(run["error"]), 4),
        (f"error, {denoising.LONGER} tokens", lambda run: float(run["error_longer"]), 4),
        ("attention on signals", lambda run: float(run["on_signals"]), 3),
        ("‖W_q W_kᵀ‖", lambda run: float(run["norm"]), 1),
    ]
    lines = ["| σ | " + " | ".join(denoising.WITHOUT) + " |", "|---" * 5 + "|"]
    for sigma, values in found["untrained"].items():
        lines.append(f"| {sigma} | " + " | ".join(f"{values[name]:.4f}" for name in denoising.WITHOUT) + " |")
    return [*lines, "", *table(found, columns, "σ")]


def of_passkey(found: Mapping[str, Any]) -> list[str]:
    """Right answers by length."""

    def at(n: int, name: str) -> Callable[[Run], float]:
        return lambda run: float(run["lengths"][str(n)][name])

    columns: list[Column] = [(f"right, {n:,}", at(n, "accuracy"), 3) for n in passkey.LENGTHS]
    columns.append((f"nats, {passkey.LENGTHS[-1]:,}", at(passkey.LENGTHS[-1], "loss"), 3))
    return table(found, columns, "setting")


def of_maps(found: Mapping[str, Any]) -> list[str]:
    """Spikiness and norm."""

    def of(name: str) -> Callable[[Run], float]:
        return lambda run: float(run["maps"][name])

    columns: list[Column] = [
        ("spikiness", of("spikiness"), 3),
        ("largest weight", of("max_weight"), 3),
        ("entropy / ln n", of("entropy_share"), 3),
        ("‖W_q W_kᵀ‖, mean of heads", of("norm"), 2),
    ]
    return table(found, columns, "where")


def of_text(found: Mapping[str, Any]) -> list[str]:
    """Bits per byte, cost, and what `compare` says against softmax."""
    base = found["arms"][0]["parameters"]["total"]
    lines = [
        "| arm | rate | test bits per byte | parameters added | share | step, ratio |",
        "|---|---|---|---|---|---|",
    ]
    for arm in found["arms"]:
        added = arm["parameters"]["total"] - base
        tests = [run["test"] for run in arm["runs"] if run["test"] is not None]
        speed = "-" if arm["speed"] is None else f"{arm['speed']['ratio']:.2f}"
        rate = "-" if arm["rate"] is None else f"{arm['rate']:g}" + "*" * arm["at_edge"]
        lines.append(f"| {arm['name']} | {rate} | {said(tests, 4)} | {added:,} | {added / base:.3%} | {speed} |")
    if any(arm["at_edge"] for arm in found["arms"]):
        lines += ["", "\\* at the edge of the grid."]
    return [*lines, "", *(f"- {arm['comparison']['sentence']}" for arm in found["arms"][1:])]


def of_parameters(rows: Sequence[Run]) -> list[str]:
    """One row for each model."""
    kinds = list(dict.fromkeys(row["granularity"] for row in rows))
    lines = [f"| model | parameters | {' | '.join(kinds)} |", "|---" * (2 + len(kinds)) + "|"]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = {row["granularity"]: row for row in rows if row["model"] == name}
        cells = [f"{own[kind]['added']:,} ({own[kind]['share']:.3%})" for kind in kinds]
        lines.append(f"| {name} | {own[kinds[0]]['plain']:,} | {' | '.join(cells)} |")
    return lines


TITLES = {
    "theory": "(a) Dilution of fixed scores",
    "dilution": "(a) Dilution in a trained layer: retrieval, trained at 8 to 64 keys",
    "token_generation": "(b) Token generation",
    "denoising": "(c) Denoising",
    "passkey": "(d) Passkey, trained at 64 tokens",
    "maps": "(e) Spikiness and ‖W_q W_kᵀ‖ of trained models",
    "text": "(f) Text",
    "parameters": "(f) Parameters added",
}
TABLES: Mapping[str, Callable[[Any], list[str]]] = {
    "theory": of_theory,
    "dilution": of_dilution,
    "token_generation": of_token_generation,
    "denoising": of_denoising,
    "passkey": of_passkey,
    "maps": of_maps,
    "text": of_text,
    "parameters": of_parameters,
}
FIGURES = {"dilution": "dilution.svg", "passkey": "passkey.svg"}


def page(results: Mapping[str, Any]) -> list[str]:
    """Everything between the README's marks."""
    judged = [one for part in TITLES if part in results for one in results[part]["claims"]]
    counts = {verdict: sum(one["verdict"] == verdict for one in judged) for verdict in _order(judged)}
    lines = ["Of " + f"{len(judged)} claims: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) + ".", ""]
    missing = [part for part in TITLES if part not in results]
    if missing:
        lines += [f"Not run yet: {', '.join(missing)}.", ""]
    for part, title in TITLES.items():
        if part not in results:
            continue
        lines += [f"### {title}", ""]
        if part in FIGURES:
            lines += [f"![{part} by length](results/{FIGURES[part]})", ""]
        lines += [*TABLES[part](results[part]["found"]), "", *claim_lines(results[part]["claims"]), ""]
    return lines[:-1]


def _order(judged: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(sorted(one["verdict"] for one in judged)))
