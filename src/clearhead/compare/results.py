"""From a folder of runs to one plain value: everything that the report shows, and that `results.json` holds.

The report computes nothing. A figure that is not in here is not in the report, so the two cannot disagree.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from clearhead.compare import curves, equal_rate, tuning
from clearhead.compare import statistics as st
from clearhead.compare.arms import Arm
from clearhead.compare.layout import Layout
from clearhead.compare.plan import ComparePlan
from clearhead.compare.records import Record, load_record, outcomes
from clearhead.compare.verdict import Comparison, Rates, Status, Verdict, compare_outcomes

FORMAT = "clearhead.compare/1"
CONFIDENCE = 0.95
POWER = 0.8
LARGEST_DOCUMENTS = 20


def collect(folder: Path) -> dict[str, Any]:
    """Read a comparison's folder, finished or not, and return its results as plain, JSON-ready values."""
    layout = Layout(Path(folder))
    plan = ComparePlan.load(layout.folder)
    records = read_records(plan, layout)
    resolved = _read(layout.resolved) or {}
    probe = _read(layout.probe)
    comparisons = judge(plan, records, equal_rate.rates(plan, layout))
    missing = [f"{r.arm}, seed {r.seed}" for runs in records.values() for r in runs if r.status is Status.MISSING]
    missing += equal_rate.missing(plan, layout, comparisons)
    results = {
        "format": FORMAT,
        "clearhead": importlib.metadata.version("clearhead"),
        "complete": not missing,
        "missing": missing,
        "headline": headline(plan, comparisons, missing, records[plan.baseline]),
        "plan": plan.identity(),
        "sizing": plan.sizing,
        "score": plan.base.score,
        "unit": unit(plan),
        "definitions": {
            "confidence": CONFIDENCE,
            "power": POWER,
            "comparisons": len(plan.arms) - 1,
            "spike_factor": st.SPIKE_FACTOR,
            "spike_window": st.SPIKE_WINDOW,
            "bootstrap_from_seeds": st.BOOTSTRAP_FROM,
        },
        "data": resolved.get("data"),
        "budget": resolved.get("budget"),
        "arms": [arm_results(plan, arm, records, comparisons[arm.name], resolved, probe) for arm in plan.arms],
        "documents": by_document(plan, records),
        "over_documents": over_documents(plan, records),
        "tuning": tuning.summary(plan, layout),
        "probe": probe,
        "sessions": (sessions := _read_lines(layout.sessions)),
        "mixed": len({json.dumps([s["versions"], s["commit"], s["processor"]]) for s in sessions}) > 1,
        "runs": [run_row(record, plan.base.score) for runs in records.values() for record in runs],
    }
    return plain(results)


def read_records(plan: ComparePlan, layout: Layout) -> dict[str, list[Record]]:
    """Return the runs of every arm that count for the verdict, done or not."""
    return {arm.name: [load_record(layout.run(arm, seed), arm.name, seed) for seed in plan.seeds] for arm in plan.arms}


def judge(
    plan: ComparePlan,
    records: Mapping[str, Sequence[Record]],
    rates: Mapping[str, Rates] | None = None,
    *,
    resamples: int = st.RESAMPLES,
) -> dict[str, Comparison]:
    """Compare every arm with the baseline on test bits per byte (of a generated task: per answer).

    `rates`: of the arms that chose another learning rate than the baseline, as `equal_rate.rates` gives them.
    `resamples`: of the bootstrap beside the intervals, which no verdict depends on; 0 = none.
    """
    ends = {name: outcomes(name, runs) for name, runs in records.items()}
    candidates = [ends[arm.name] for arm in plan.arms if arm.name != plan.baseline]
    found = compare_outcomes(
        ends[plan.baseline],
        candidates,
        confidence=CONFIDENCE,
        power=POWER,
        unit=unit(plan),
        rates=rates,
        resamples=resamples,
    )
    result = {outcome.name: comparison for outcome, comparison in zip(candidates, found, strict=True)}
    base = ends[plan.baseline]
    failed = len(base.seeds(Status.DIVERGED, Status.CRASHED))
    count = f"; {failed} of its {len(plan.seeds)} runs did not finish" if failed else ""
    sentence = f"{plan.baseline} is what the others are measured against{count}."
    result[plan.baseline] = Comparison(Verdict.BASELINE, sentence, [], [])
    return result


def headline(
    plan: ComparePlan, comparisons: Mapping[str, Comparison], missing: Sequence[str], baseline: Sequence[Record]
) -> str:
    """Say the outcome in one line."""
    if missing:
        total = (len(plan.arms) + len(equal_rate.wanted(plan, comparisons.values()))) * len(plan.seeds)
        return f"Unfinished: {len(missing)} of {total} runs are missing. What follows is interim."
    groups: dict[Verdict, list[str]] = {}
    for name, comparison in comparisons.items():
        if comparison.verdict is not Verdict.BASELINE:
            groups.setdefault(comparison.verdict, []).append(name)
    words = {
        Verdict.BETTER: "better than {base}: {names}",
        Verdict.WORSE: "worse than {base}: {names}",
        Verdict.NO_DIFFERENCE: "no difference from {base} shown at this size: {names}",
        Verdict.DIVERGED: "diverged: {names}",
        Verdict.CRASHED: "crashed: {names}",
        Verdict.NOT_JUDGED: "not judged: {names}",
    }
    parts = []
    if not any(run.status is Status.FINISHED for run in baseline):
        parts.append(f"nothing to compare with, no run of the baseline {plan.baseline} finished")
    parts += [
        form.format(base=plan.baseline, names=", ".join(groups[verdict]))
        for verdict, form in words.items()
        if verdict in groups
    ]
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


def arm_results(
    plan: ComparePlan,
    arm: Arm,
    records: Mapping[str, Sequence[Record]],
    comparison: Comparison,
    resolved: Mapping[str, Any],
    probe: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Gather everything about one arm."""
    runs = records[arm.name]
    finished = [run for run in runs if run.status is Status.FINISHED]
    about = resolved.get("arms", {}).get(arm.name, {})
    speed = (probe or {}).get("arms", {}).get(arm.name)
    seconds_per_token = speed["median_seconds"] / speed["tokens_per_step"] if speed else None
    return {
        "name": arm.name,
        "baseline": arm.name == plan.baseline,
        "overrides": dict(arm.overrides),
        "setup": about,
        "status": {status.value: sum(run.status is status for run in runs) for status in Status},
        "failures": [
            {"seed": run.seed, "status": run.status.value, "reason": run.reason, "steps": run.steps}
            for run in runs
            if run.status in (Status.DIVERGED, Status.CRASHED)
        ],
        "test": spread([run.test for run in finished]),
        "val": spread([run.val for run in finished]),
        "comparison": asdict(comparison),
        "curves": curves.of_arm(runs, records[plan.baseline], seconds_per_token, arm.name == plan.baseline),
        "reach": curves.reach(runs, records[plan.baseline], seconds_per_token),
        "gradient": gradient(runs),
        "speed": speed,
        "run_speed": spread([run.tokens_per_second for run in finished]),
        "peak_memory": spread([run.peak_memory for run in finished]),
        "cpu_seconds": spread([run.cpu_seconds for run in finished]),
    }


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Return mean, standard deviation (from two values), lowest, highest and count."""
    x = np.array([value for value in values if value is not None and math.isfinite(value)], float)
    if x.size == 0:
        return {"n": 0, "mean": None, "sd": None, "low": None, "high": None}
    sd = float(x.std(ddof=1)) if x.size > 1 else None
    return {"n": int(x.size), "mean": float(x.mean()), "sd": sd, "low": float(x.min()), "high": float(x.max())}


def by_document(plan: ComparePlan, records: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """Return, for each of the largest test documents, every arm's mean paired difference on that document alone.

    The intervals speak of seeds; this shows whether an effect is spread over the text or sits in one document.
    """
    rows = document_differences(plan, records)
    return sorted(rows, key=lambda row: -row["bytes"])[:LARGEST_DOCUMENTS]


def document_differences(plan: ComparePlan, records: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """Return, for each test document, its bytes and each arm's mean over seeds of the paired difference on it."""
    scores = {
        (run.arm, run.seed): {document["name"]: document for document in run.documents}
        for runs in records.values()
        for run in runs
        if run.status is Status.FINISHED
    }
    base = {seed: scores[plan.baseline, seed] for seed in plan.seeds if (plan.baseline, seed) in scores}
    if not base:
        return []
    sizes = {name: document["bytes"] for name, document in next(iter(base.values())).items()}
    rows = []
    for name in sizes:
        differences = []
        for arm in plan.arms:
            pairs = [
                scores[arm.name, seed][name]["bits_per_byte"] - documents[name]["bits_per_byte"]
                for seed, documents in base.items()
                if name in documents and name in scores.get((arm.name, seed), {})
            ]
            differences.append(float(np.mean(pairs)) if pairs else None)
        rows.append({"name": name, "bytes": sizes[name], "differences": differences})
    return rows


def over_documents(plan: ComparePlan, records: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """Return, for each arm, the mean over test documents of that difference, each counted once, with its interval.

    The other luck: not of the seed but of which documents were held out. It stands beside the verdict and decides
    nothing. `interval` is None for fewer than two documents, and for the baseline.
    """
    rows = document_differences(plan, records)
    made = []
    for place, arm in enumerate(plan.arms):
        found = np.array([row["differences"][place] for row in rows if row["differences"][place] is not None], float)
        known = found.size > 0 and arm.name != plan.baseline
        interval = st.student_interval(found, confidence=CONFIDENCE, comparisons=len(plan.arms) - 1) if known else None
        made.append(
            {
                "documents": int(found.size),
                "mean": float(found.mean()) if known else None,
                "interval": None if interval is None else asdict(interval),
            }
        )
    return made


def gradient(runs: Sequence[Record]) -> dict[str, Any] | None:
    """Return the gradient-norm tail over all of an arm's runs; spikes are counted within each run."""
    each = [run.train["grad_norm"] for run in runs if "grad_norm" in run.train]
    whole = st.gradient_tail(np.concatenate(each)) if each else None
    if whole is None:
        return None
    tails = [tail for norms in each if (tail := st.gradient_tail(norms)) is not None]
    return {
        **asdict(whole),
        "spikes": sum(tail.spikes for tail in tails),
        "runs_with_spikes": sum(tail.spikes > 0 for tail in tails),
        "runs": len(tails),
        "skipped": sum(run.skipped for run in runs),
    }


def unit(plan: ComparePlan) -> str:
    """What the plan's arms are judged by, in words."""
    return plan.base.score.replace("_", " ")


def run_row(record: Record, score: str) -> dict[str, Any]:
    """Return one run as a flat row: a line of `results.csv`."""
    tail = st.gradient_tail(record.train["grad_norm"]) if "grad_norm" in record.train else None
    return {
        "arm": record.arm,
        "seed": record.seed,
        "status": record.status.value,
        f"test_{score}": record.test,
        f"val_{score}": record.val,
        **({} if score == "bits_per_byte" else {"test_accuracy": record.accuracy}),
        "learning_rate": record.learning_rate,
        "steps": record.steps,
        "tokens": record.tokens,
        "wall_seconds": record.wall_seconds,
        "cpu_seconds": record.cpu_seconds,
        "tokens_per_second": record.tokens_per_second,
        "peak_memory_bytes": record.peak_memory,
        "grad_norm_median": tail.median if tail else None,
        "grad_norm_p99": tail.p99 if tail else None,
        "grad_norm_largest": tail.largest if tail else None,
        "grad_norm_spikes": tail.spikes if tail else None,
        "skipped_steps": record.skipped,
        "reason": record.reason,
        "folder": "/".join(record.folder.parts[-3:]),
    }


def plain(value: Any) -> Any:
    """Turn numpy values, enums and paths into JSON's own types; a number that is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(inner) for inner in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return value.as_posix()
    return value


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return value
    except (OSError, ValueError):
        return None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):  # torn by a kill
            lines.append(json.loads(line))
    return lines
