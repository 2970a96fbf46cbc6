"""The tables and sentences of the text comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments import equal_rate
from experiments.laser import look
from experiments.running import mean_half


def page(found: Mapping[str, Any] | None) -> list[str]:
    """Scores, what LASER adds in each setting, gradient tails, the look inside."""
    if found is None:
        return ["Text: not run yet."]
    arms = found["arms"]
    lines = [
        "| arm | parameters | rate chosen | finished | test bits per byte | less softmax, simultaneous 95 % "
        "| step, ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        tests = [value for value in arm["tests"].values() if value is not None]
        compared = arm["comparison"]
        against = "" if compared["mean"] is None else f"{compared['mean']:+.4f} {_interval(compared['interval'])}"
        speed = f"{arm['speed']['ratio']:.2f}" if arm["speed"] else ""
        lines.append(
            f"| {arm['name']} | {arm['parameters']:,} | {_rate(arm)} | {len(tests)} of {len(arm['tests'])} "
            f"| {_pm(tests)} | {against} | {speed} |"
        )
    lines += ["", *(f"- {line}" for line in judge(found)), ""]
    lines += [
        "| gradient norm before clipping | median | 99 % | largest | largest / median | spikes | runs with spikes "
        "| skipped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        tail = arm["gradient"]
        if tail is not None:
            lines.append(
                f"| {arm['name']} | {tail['median']:.3f} | {tail['p99']:.3f} | {tail['largest']:.3f} "
                f"| {tail['largest'] / tail['median']:.1f} | {tail['spikes']} "
                f"| {tail['runs_with_spikes']} of {tail['runs']} | {tail['skipped']} |"
            )
    lines += ["", *look.table(arms), ""]
    return [*lines, *(f"- {arm['comparison']['sentence']}" for arm in arms[1:])]


def judge(found: Mapping[str, Any]) -> list[str]:
    """What LASER adds, all else alike, in each of the three settings."""
    return [_sentence(row) for row in found["pairs"]]


def _sentence(row: Mapping[str, Any]) -> str:
    what = f"{row['name']} against {row['against']}"
    failed = "".join(
        f" {count} runs of {name} did not finish."
        for name, count in zip((row["name"], row["against"]), row["failed"], strict=True)
        if count
    )
    if row["mean"] is None:
        return f"{what}: not judged, there is no seed at which both finished.{failed}"
    if row["interval"] is None:
        return f"{what}: not judged, {row['seeds']} pairs without a spread.{failed}"
    low, high = row["interval"]
    verdict = f"*{row['verdict']}*"
    if high < 0 and row["failed"][0]:
        verdict += ", since not all of its runs finished"
    elif row["equal_rate"] is not None:
        verdict = f"*{equal_rate.words(row['verdict'], row['equal_rate'])}*"
    text = (
        f"{what}: {verdict}, {row['mean']:+.4f} bits per byte [{low:+.4f}, {high:+.4f}] over {row['seeds']} pairs; a "
        f"true difference of {row['detectable']:.4f} would have been found 80 % of the time"
    )
    check = row["equal_rate"]
    if check is not None and check["holds"]:
        text += f"; it holds at one learning rate, with {equal_rate.at_one_rate(check)}"
    if row["of"]:
        text += f"; the other's best validation value reached in {row['reached']} of {row['of']} seeds"
        if row["share"] is not None:
            text += f", after {row['share']:.2f} of its tokens"
            if row["speed_ratio"] is not None:
                text += f" and {row['share'] * row['speed_ratio']:.2f} of its time"
    return f"{text}.{failed}"


def _rate(arm: Mapping[str, Any]) -> str:
    rate = "" if arm["rate"] is None else f"{arm['rate']:g}"
    return f"{rate} (edge)" if arm["tuning"] and arm["tuning"]["at_edge"] else rate


def _pm(values: list[float]) -> str:
    if not values:
        return "diverged"
    mean, half = mean_half(values)
    return f"{mean:.4f}" if half is None else f"{mean:.4f} ± {half:.4f}"


def _interval(interval: Mapping[str, float] | None) -> str:
    return "" if interval is None else f"[{interval['low']:+.4f}, {interval['high']:+.4f}]"
