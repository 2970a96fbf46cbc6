"""The tables of the adopted encoders."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.adopt_encoders.under import OWN, UNIFORM
from experiments.running import mean_half

Run = Mapping[str, Any]
TITLES = {
    OWN: "its own attention",
    UNIFORM: "control: every key weighs the same",
}


def page(results: Mapping[str, Any]) -> list[str]:
    """What stands between the README's marks."""
    lines: list[str] = []
    for part, table in (
        ("sentences", sentence_tables),
        ("antibodies", residue_tables),
        ("recovery", recovery_table),
        ("speech", speech_table),
        ("digits", digit_table),
    ):
        runs = results.get(part)
        if runs:
            lines += table([run for run in runs if "refused" not in run])
            lines += [f"Refused: {run['attention']}: {run['refused']}." for run in _once(runs)]
            lines.append("")
    return lines


def _once(runs: Sequence[Run]) -> list[Run]:
    return list({run["attention"]: run for run in runs if "refused" in run}.values())


def title(attention: str) -> str:
    """How an arm is called in a table."""
    return TITLES.get(attention, f"`{attention}`")


def family(attention: str) -> str:
    """The arm without its draw."""
    return attention.split(",seed=")[0]


def by_family(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Arms in order, each with its draws."""
    answer: dict[str, list[Run]] = {}
    for run in runs:
        answer.setdefault(family(run["attention"]), []).append(run)
    return answer


def told(values: Sequence[float], places: int = 3, *, signed: bool = False) -> str:
    """Mean and half of Student's interval, where there is one."""
    mean, half = mean_half(values)
    text = f"{mean:+.{places}f}" if signed else f"{mean:.{places}f}"
    return text if half is None else f"{text} ± {half:.{places}f}"


def share(hits: int, of: int) -> str:
    """A share with Wilson's 95 % interval."""
    z, p = 1.96, hits / of
    middle = (p + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return f"{p:.3f} ({max(middle - half, 0):.3f} to {min(middle + half, 1):.3f})"


def sentence_tables(runs: Sequence[Run]) -> list[str]:
    """One table a task."""
    lines = ["### MiniLM: sentence vectors", ""]
    for task in dict.fromkeys(run["task"] for run in runs):
        own = [run for run in runs if run["task"] == task]
        lines += [
            f"| {task}, {own[0]['pairs']} pairs | largest change of a vector's entry | cosine to its own vector | rank "
            "correlation of similarities | cosine, same verse | other verse | finds its other translation |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, draws in by_family(own).items():
            kept = [sum(run["kept_n"]) / len(run["kept_n"]) for run in draws]
            # Draws are averaged within a group first: groups are the samples.
            ranks = [sum(values) / len(values) for values in zip(*(run["ranks"] for run in draws), strict=True)]
            hits = [run["found"].count("1") for run in draws]
            cells = [
                title(name) + (f", {len(draws)} draws" if len(draws) > 1 else ""),
                f"{max(run['largest_difference'] for run in draws):.1e}",
                f"{_mean(kept):.3f}",
                told(ranks),
                f"{_mean([run['same'] for run in draws]):.3f}",
                f"{_mean([run['other'] for run in draws]):.3f}",
                share(hits[0], own[0]["pairs"])
                if len(draws) == 1
                else ", ".join(f"{hit / own[0]['pairs']:.3f}" for hit in hits),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        words = own[0].get("by_words")
        if words is not None:
            lines += ["", f"By shared words alone, no model: {words:.3f} find their other translation."]
        lines.append("")
    return lines


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def accuracy(chains: Sequence[Run]) -> list[float]:
    """Share of residues named right, a chain."""
    return [chain["right"] / chain["of"] for chain in chains]


def averaged(draws: Sequence[Run]) -> list[float]:
    """Share by chain, over draws."""
    return [_mean(values) for values in zip(*(accuracy(run["chains"]) for run in draws), strict=True)]


def residue_tables(runs: Sequence[Run]) -> list[str]:
    """Accuracy and loss by arm; paired with the unpatched model."""
    own = [run for run in runs if run["source"] == "antibodies"]
    if not own:
        return []
    arms = by_family(own)
    base = averaged(arms[OWN])
    half = len(base) // 2
    residues = sum(chain["of"] for chain in own[0]["chains"])
    lines = [
        "### AntiBERTy: masked residues",
        "",
        f"| {half} heavy and {len(base) - half} light chains, {residues:,} residues | right | heavy | light | less its "
        "own | nats |",
        "|---|---|---|---|---|---|",
    ]
    for name, draws in arms.items():
        found = averaged(draws)
        nats = [sum(c["nats"] for c in run["chains"]) / sum(c["of"] for c in run["chains"]) for run in draws]
        cells = [
            title(name) + (f", {len(draws)} draws" if len(draws) > 1 else ""),
            told(found),
            f"{_mean(found[:half]):.3f}",
            f"{_mean(found[half:]):.3f}",
            "" if name == OWN else told([a - b for a, b in zip(found, base, strict=True)], signed=True),
            f"{_mean(nats):.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for run in own[:1]:
        if "most_common" in run:
            lines += ["", f"Always naming the most common residue of these chains: {run['most_common']:.3f} right."]
    for run in runs:
        if run["source"] == "proteins":
            common = f" (the most common residue: {run['most_common']:.3f})" if "most_common" in run else ""
            lines += [
                "",
                f"{len(run['chains'])} proteins that are no antibodies, its own attention: "
                f"{told(accuracy(run['chains']))} right{common}: AntiBERTy knows antibodies and nothing else.",
            ]
    return [*lines, ""]


def recovery_table(runs: Sequence[Run]) -> list[str]:
    """Share right by step, mean over seeds."""
    if not runs:
        return []
    looks = list(runs[0]["looks"])
    lines = [
        "### AntiBERTy: trained on for a few steps",
        "",
        f"| right after so many steps, on {runs[0]['trained_on']} chains of other families | "
        + " | ".join(looks)
        + " |",
        f"|---|{'---|' * len(looks)}",
    ]
    for name, seeds in by_family(runs).items():
        cells = [told([_mean(accuracy(run["looks"][look])) for run in seeds]) for look in looks]
        lines.append(f"| {title(name)}, {len(seeds)} seeds | {' | '.join(cells)} |")
    return [*lines, ""]


def error_rate(clips: Sequence[Run]) -> float:
    """Errors of all clips by words of all clips."""
    return sum(clip["errors"] for clip in clips) / sum(clip["words"] for clip in clips)


def resampled(clips: Sequence[Run], other: Sequence[Run] | None = None, draws: int = 2000) -> tuple[float, float]:
    """Bootstrap over clips: 95 % interval of the rate, or of its difference to the same clips of another arm."""
    draw, found = random.Random(0), []
    for _ in range(draws):
        picked = [draw.randrange(len(clips)) for _ in clips]
        value = error_rate([clips[i] for i in picked])
        found.append(value if other is None else value - error_rate([other[i] for i in picked]))
    found.sort()
    return found[int(0.025 * draws)], found[int(0.975 * draws)]


def speech_table(runs: Sequence[Run]) -> list[str]:
    """Word error rate by source of clips."""
    if not runs:
        return []
    base = runs[0]["clips"]
    sources = list(dict.fromkeys(clip["source"] for clip in base))
    heads = [f"{s} ({sum(c['source'] == s for c in base)} clips)" for s in sources]
    lines = [
        "### Whisper tiny.en: words wrong",
        "",
        f"| word error rate, {len(base)} clips, {sum(c['words'] for c in base)} words | all | less its own | "
        + " | ".join(heads)
        + " | same transcript as its own | more errors than words |",
        f"|---|---|---|{'---|' * len(sources)}---|---|",
    ]
    for run in runs:
        low, high = resampled(run["clips"])
        cells = [title(run["attention"]), f"{error_rate(run['clips']):.3f} ({low:.3f} to {high:.3f})"]
        if run["attention"] == OWN:
            cells.append("")
        else:
            low, high = resampled(run["clips"], base)
            cells.append(f"{error_rate(run['clips']) - error_rate(base):+.3f} ({low:+.3f} to {high:+.3f})")
        cells += [f"{error_rate([c for c in run['clips'] if c['source'] == s]):.3f}" for s in sources]
        same = sum(a["heard"] == b["heard"] for a, b in zip(run["clips"], base, strict=True))
        away = sum(clip["errors"] > clip["words"] for clip in run["clips"])
        lines.append(f"| {' | '.join([*cells, f'{same} of {len(base)}', f'{away} clips'])} |")
    return [*lines, ""]


def digit_table(runs: Sequence[Run]) -> list[str]:
    """Test accuracy over seeds, paired with the model's own attention."""
    if not runs:
        return []
    arms = by_family(runs)
    base = {run["seed"]: run for run in arms[OWN]}
    lines = [
        "### A small ViT, trained from scratch on digits",
        "",
        f"| {len(base)} seeds, {runs[0]['epochs']} epochs, {runs[0]['of']} test images | right "
        "| less its own, paired | nats |",
        "|---|---|---|---|",
    ]
    for name, seeds in arms.items():
        right = [run["right"] / run["of"] for run in seeds]
        gaps = [run["right"] / run["of"] - base[run["seed"]]["right"] / run["of"] for run in seeds]
        cells = [title(name), told(right, 4), "" if name == OWN else told(gaps, 4, signed=True)]
        cells.append(told([run["nats"] for run in seeds], 4))
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]
