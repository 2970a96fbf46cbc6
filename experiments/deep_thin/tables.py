"""The results as lines of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments import equal_rate
from experiments.deep_thin.judge import SECOND


def tables(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each task what the arms are and came to, and the paired comparisons."""
    lines: list[str] = []
    for result in results:
        lines += [f"### {result['title']}", "", *_arms(result), "", *_pairs(result), *_unchecked(result), ""]
    return lines


def _arms(result: Mapping[str, Any]) -> Iterable[str]:
    second = next((name for name in SECOND if name in result["arms"][0]), None)
    head = ["arm", "layers x width", "parameters (outside embeddings)", "learning rate", result["metric"]]
    head += [SECOND[second]] if second else []
    yield "| " + " | ".join([*head, "ms a step (ratio)"]) + " |"
    yield "|---" * (len(head) + 1) + "|"
    for arm in result["arms"]:
        layers = f"{arm['layers']} + {arm['layers']}" if arm["stacks"] == 2 else str(arm["layers"])
        cells = [
            arm["words"],
            f"{layers} x {arm['width']}",
            f"{arm['parameters']:,} ({arm['outside_embedding']:,})",
            f"{arm['rate']:g}{' (edge)' if arm['rate_at_edge'] else ''}",
            _spread(arm.get("test"), result["digits"]) + (f", {arm['diverged']} diverged" if arm["diverged"] else ""),
        ]
        if second:
            cells.append(_spread(arm.get(second), 2 if second == "chrf" else 3))
        yield "| " + " | ".join([*cells, f"{arm['step_ms']:.0f} ({arm['step_ratio']:.1f})"]) + " |"


def _pairs(result: Mapping[str, Any]) -> Iterable[str]:
    words = {arm["name"]: arm["words"] for arm in result["arms"]}
    yield "| candidate | against | difference, simultaneous 95 % interval | verdict |"
    yield "|---|---|---|---|"
    for pair in result["pairs"]:
        verdict, check = pair["verdict"], pair["equal_rate"]
        if check is not None and check["missing"]:
            verdict = f"{pair['at_chosen_rates']} at the rates that each chose; not checked at one rate"
        elif check is not None:
            verdict = equal_rate.words(verdict, check | {"anew": words[check["anew"]]}, result["digits"])
        elif verdict.startswith("no difference") and pair["detectable"] is not None:
            verdict += f" ({pair['detectable']:.{result['digits']}f} would have been found 80 % of the time)"
        yield f"| {pair['candidate']} | {pair['against']} | {_difference(pair, result['digits'])} | {verdict} |"


def _unchecked(result: Mapping[str, Any]) -> Iterable[str]:
    """Name the verdicts that no run at one learning rate has held in check yet."""
    open_ = [pair for pair in result["pairs"] if pair["equal_rate"] is not None and pair["equal_rate"]["missing"]]
    if open_:
        words = {arm["name"]: arm["words"] for arm in result["arms"]}
        yield ""
        yield (
            "Not checked at one learning rate, so that the difference may be one of the rates, which one tuning seed "
            "tells apart by luck:"
        )
        yield ""
    for pair in open_:
        check = pair["equal_rate"]
        yield (
            f"- {pair['candidate']}, *{pair['at_chosen_rates']}* than {pair['against']}: {check['missing']} runs of "
            f"{words[check['anew']]} at {check['rate']:g} would show it."
        )


def _difference(pair: Mapping[str, Any], digits: int) -> str:
    if pair["mean"] is None:
        return "none"
    text = f"{pair['mean']:+.{digits}f}"
    return text if pair["low"] is None else f"{text} ({pair['low']:+.{digits}f} to {pair['high']:+.{digits}f})"


def _spread(value: Mapping[str, float] | None, digits: int) -> str:
    return "none" if value is None else f"{value['mean']:.{digits}f} ± {value['sd']:.{digits}f}"
