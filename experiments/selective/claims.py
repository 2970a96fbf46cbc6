"""What is claimed, part by part, in a form that runs can decide. Fixed before the runs that count.

Where a claim is ours and not the paper's (a factor, a way to measure), the README says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.selective import dilution, passkey, theory, token_generation
from experiments.selective.arms import (
    BASELINE,
    CONTROL,
    NO_POSITION,
    NO_TOKEN,
    QUERY_ONLY,
    SHARED,
    VALUE_ONLY,
    WHOLE,
)
from experiments.selective.judge import Claim, exact
from experiments.selective.parameters import CLAIMED

LONGEST = str(dilution.LENGTHS[-1])
FACTOR = 3.0
"""Ours: by how much more attention on the target must be at 4,096 keys."""


def _at(length: str, name: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda run: float(run["lengths"][length][name])


def _ln(name: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda run: math.log(run[name])


def _of_maps(name: str, *, log: bool = False) -> Callable[[Mapping[str, Any]], float]:
    return lambda run: math.log(run["maps"][name]) if log else float(run["maps"][name])


def _accuracy(text: str, arm: str, other: str, length: str, setting: str = "") -> Claim:
    return Claim(text, arm, other, f"right answers at {length}", _at(length, "accuracy"), setting, higher=True)


def of_theory(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The paper's dilution bound, and what log n does to a needle, for scores that do not change."""
    formula = [row for row in rows if row["formula"]["max_weight"] is not None]
    same = [row for row in formula if row["kind"] != "bound, random tokens"]
    worst = max(abs(row["max_weight"] - row["formula"]["max_weight"]) for row in same)
    above = max(
        row["max_weight"] - row["formula"]["max_weight"] for row in formula if row["kind"] == "bound, random tokens"
    )
    first, last = theory.LENGTHS[0], theory.LENGTHS[-1]
    flat = {row["n"]: row["max_weight"] for row in rows if row["kind"] == "needle" and row["slope"] == 0}
    held = {row["n"]: row["max_weight"] for row in rows if row["kind"] == "needle" and row["slope"] == 1 / theory.SCORE}
    weak = {
        row["n"]: row["max_weight"] for row in rows if row["kind"] == "needle" and row["slope"] == 0.5 / theory.SCORE
    }
    return [
        exact(
            "unit-norm tokens: the largest weight is at most 1 / (1 + (L-1) e^(-2‖W‖))",
            worst < 1e-9 and above <= 1e-9,
            f"the best case meets it to {worst:.0e}, random tokens stay below it at every length and slope",
        ),
        exact(
            "without a temperature attention dilutes with length",
            flat[last] < flat[first] / 10,
            f"a needle {theory.SCORE:g} above the rest: weight {flat[first]:.3f} at {first} keys, {flat[last]:.4f} "
            f"at {last:,}",
        ),
        exact(
            "tau = 1 + slope ln n stops it",
            abs(held[last] - held[first]) < 0.01,
            f"exactly where slope times the needle's score is 1 or more: weight {held[first]:.3f} and {held[last]:.3f} "
            f"at 1; at one half it still falls, {weak[first]:.3f} to {weak[last]:.3f}",
        ),
    ]


def of_dilution() -> list[Claim]:
    """Trained retrieval."""
    target = _at(LONGEST, "ln_target")
    weight = "geometric mean weight of the target"
    return [
        Claim(
            f"{LONGEST} keys: selective attends to the target {FACTOR:g} times as much as softmax",
            WHOLE,
            BASELINE,
            weight,
            target,
            higher=True,
            margin=math.log(FACTOR),
            ratio=True,
        ),
        Claim(
            f"{LONGEST} keys: more than the learned scalar does",
            WHOLE,
            CONTROL,
            weight,
            target,
            higher=True,
            ratio=True,
        ),
        Claim(
            f"{LONGEST} keys: the position part carries it (whole against no position part)",
            WHOLE,
            NO_POSITION,
            weight,
            target,
            higher=True,
            ratio=True,
        ),
        Claim(
            f"{LONGEST} keys: the token part helps beside it (whole against no token part)",
            WHOLE,
            NO_TOKEN,
            weight,
            target,
            higher=True,
            ratio=True,
        ),
        _accuracy(f"{LONGEST} keys: more right answers than softmax", WHOLE, BASELINE, LONGEST),
        _accuracy(f"{LONGEST} keys: more right answers than the learned scalar", WHOLE, CONTROL, LONGEST),
        Claim("‖W_q W_kᵀ‖ is smaller than softmax's", WHOLE, BASELINE, "norm", _ln("norm"), ratio=True),
        Claim("‖W_q W_kᵀ‖ is smaller than the learned scalar's", WHOLE, CONTROL, "norm", _ln("norm"), ratio=True),
    ]


def of_token_generation(settings: Sequence[str]) -> list[Claim]:
    """The toy of figure 3, in 2 and 3 dimensions."""
    grouped, token = token_generation.GROUPED, token_generation.TOKEN
    what, found = "excess cross-entropy", []

    def less(arm: str, other: str, setting: str, words: str) -> Claim:
        text = f"d = {setting} tokens: {words} has less excess cross-entropy than {other}"
        return Claim(text, arm, other, what, lambda run: float(run["excess"]), setting, unit="nats")

    for setting in settings:
        for other in (BASELINE, CONTROL):
            found.append(less(grouped, other, setting, "a temperature by number of neighbours"))
        if "learned" in setting:
            continue
        where = f"d = {setting} tokens"
        found += [
            less(token, BASELINE, setting, "a temperature computed from the token"),
            Claim(f"{where}: rows are nearer than softmax's", grouped, BASELINE, "l1 distance of rows", _l1, setting),
            Claim(
                f"{where}: ‖W‖ is smaller than softmax's",
                grouped, BASELINE, "norm", _ln("norm"), setting, ratio=True,
            ),
            Claim(
                f"{where}: τ of 1 neighbour is larger than τ of 4",
                grouped, BASELINE, "τ of 1 less τ of 4", _spread, setting, higher=True,
            ),
        ]  # fmt: skip
    return found


def _l1(run: Mapping[str, Any]) -> float:
    return float(run["l1"])


def _spread(run: Mapping[str, Any]) -> float:
    return float(run["temperatures"]["1"] - run["temperatures"]["4"])  # 0 where there is one temperature


def of_denoising(noises: Sequence[str]) -> list[Claim]:
    """Value temperatures, at every strength of noise."""
    found = []
    for sigma in noises:
        for arm, other in ((VALUE_ONLY, BASELINE), (WHOLE, BASELINE), (WHOLE, CONTROL), (WHOLE, QUERY_ONLY)):
            found.append(
                Claim(
                    f"σ = {sigma}: {arm} has the smaller error than {other}",
                    arm,
                    other,
                    "error",
                    lambda run: math.log(run["error"]),
                    sigma,
                    ratio=True,
                )
            )
    return found


def of_passkey(settings: Sequence[str], length: str) -> list[Claim]:
    """Length extrapolation of whole models."""
    found = []
    for setting in settings:
        where = passkey.SETTINGS[setting].words
        for arm, other in ((WHOLE, BASELINE), (WHOLE, CONTROL), (WHOLE, NO_POSITION), (NO_TOKEN, BASELINE)):
            text = f"{where}, {length} tokens: {arm} is right more often than {other}"
            found.append(_accuracy(text, arm, other, length, setting))
    return found


def of_maps(settings: Sequence[str]) -> list[Claim]:
    """Spikiness and norm of trained models; `settings` are where they were trained."""
    found = []
    for setting in settings:
        where = "text" if setting == "text" else f"passkey, {passkey.SETTINGS[setting].words}"
        for other in (BASELINE, CONTROL):
            found += [
                Claim(
                    f"{where}: maps are spikier (a smaller number) than those of {other}",
                    WHOLE,
                    other,
                    "spikiness",
                    _of_maps("spikiness"),
                    setting,
                ),
                Claim(
                    f"{where}: ‖W_q W_kᵀ‖ is smaller than with {other}",
                    WHOLE,
                    other,
                    "norm",
                    _of_maps("norm", log=True),
                    setting,
                    ratio=True,
                ),
            ]
    return found


def of_text() -> list[Claim]:
    """The ablation on text."""

    def bits(text: str, arm: str, other: str) -> Claim:
        return Claim(text, arm, other, "bits per byte", lambda run: float(run["test"]), "text", unit="bits per byte")

    return [
        bits("selective is better than softmax", WHOLE, BASELINE),
        bits("selective is better than the learned scalar", WHOLE, CONTROL),
        bits("the token part helps (whole against none)", WHOLE, NO_TOKEN),
        bits("the position part helps (whole against none)", WHOLE, NO_POSITION),
        bits("queries and values are better than values alone", WHOLE, VALUE_ONLY),
        bits("queries and values are better than queries alone", WHOLE, QUERY_ONLY),
        bits("one shared vector is better than softmax", SHARED, BASELINE),
    ]


def of_parameters(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Less than half a percent more, by granularity."""
    found = []
    for granularity in dict.fromkeys(row["granularity"] for row in rows):
        own = [row for row in rows if row["granularity"] == granularity]
        over = [row["model"] for row in own if row["share"] >= CLAIMED]
        said = ", ".join(f"{row['model']} {row['share']:.3%}" for row in own)
        judged = exact(f"{granularity}: below {CLAIMED:.1%} more parameters in every model counted", not over, said)
        found.append(judged)
    return found
