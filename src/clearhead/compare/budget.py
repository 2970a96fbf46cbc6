"""`--budget-minutes N`: a comparison that sizes itself so that it ends in time, and says what it will be able to see.

Every arm is measured for a moment, with as many processes at a time as workers will run; then
`clearhead.compare.sizing` chooses seeds and steps. The plan that comes of it is written like any other, and how it came
about stands beside it in plan.json: the same command later finds it there and measures nothing again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from clearhead.compare import sizing
from clearhead.compare import statistics as st
from clearhead.compare.arms import read_changes
from clearhead.compare.layout import Layout
from clearhead.compare.plan import FINETUNE, PRESETS, ComparePlan
from clearhead.compare.pool import environment_of_worker, write_json
from clearhead.compare.results import CONFIDENCE, POWER
from clearhead.compare.sizing import ArmCosts, Schedule, Size, Work
from clearhead.errors import UserError

PRIOR_SPREAD = {"from nothing": (0.003, 0.02), "fine-tuning": (0.00006, 0.0043)}
"""Standard deviation of a paired difference, as a share of the value: the smallest and largest of comparisons made.

From nothing: 0.29, 0.41 and 0.65 % in the default comparison (README.md), 0.33 to 2.0 % in experiments/long_memory and
experiments/bmi; arms that train very differently had more (3.5 % in experiments/feedback). Fine-tuning: one comparison,
docs/finetune.md.
"""


def sized(minutes: float, *, progress: bool = True, **asked: Any) -> ComparePlan:
    """Return the plan that `ComparePlan.build(**asked)` gives when its steps and seeds are to fit into `minutes`.

    The time counts from this call. A folder that holds the answer to the same request already gives its plan back.

    Raises `UserError` for a request that fixes what is to be chosen, for arms that cannot be built or measured, and
    when the smallest comparison takes longer.
    """
    began = time.monotonic()
    console = Console(quiet=not progress)
    _check(minutes, asked)
    template = ComparePlan.build(**asked)
    if template.budget != "tokens":
        raise UserError("--budget-minutes gives every arm the same tokens; leave --budget out")
    folder = Path(template.folder or default_folder(template, minutes))
    found = _begun(Layout(folder), template, minutes)
    if found is not None:
        console.print(f"going on with the sizes in {folder / 'plan.json'}", markup=False, highlight=False)
        return dataclasses.replace(found, workers=template.workers, folder=folder)
    work = _measured(template, asked, console)
    size = _choose(template, asked, work, minutes, time.monotonic() - began)
    spent = round(time.monotonic() - began, 1)
    about = {
        "minutes": minutes,
        "asked": template.identity(),
        "spent_seconds": spent,
        "expected_seconds": round(work.expected(size), 1),
        "at_most_seconds": round(work.most(size), 1),
        "reserve": sizing.RESERVE,
        "work": sizing.to_dict(work),
        "smallest_effects": smallest_effects(template, size.seeds),
    }
    plan = _build(asked, size)
    plan = dataclasses.replace(plan, folder=folder, sizing=about)
    for line in words(plan):
        console.print(line, markup=False, highlight=False)
    return plan


def default_folder(template: ComparePlan, minutes: float) -> Path:
    """Return `compare-PRESET-Nmin`, with a short hash of the request when it is not a preset as it stands."""
    name = f"compare-{template.preset}-{minutes:g}min"
    if template.preset in PRESETS and template.identity() == PRESETS[template.preset].identity():
        return Path(name)
    digest = hashlib.sha256(json.dumps(template.identity(), sort_keys=True).encode()).hexdigest()
    return Path(f"{name}-{digest[:8]}")


def smallest_effects(template: ComparePlan, seeds: int) -> dict[str, Any]:
    """Return the effects, as shares of the value, that a comparison finds 80 % of the time at the known spreads."""
    kind = "fine-tuning" if template.preset == FINETUNE else "from nothing"
    comparisons = max(1, len(template.arms) - 1)
    low, high = (
        st.detectable_effect(sd, seeds, alpha=1 - CONFIDENCE, comparisons=comparisons, power=POWER)
        for sd in PRIOR_SPREAD[kind]
    )
    return {"kind": kind, "spread": list(PRIOR_SPREAD[kind]), "low": low, "high": high, "power": POWER}


def words(plan: ComparePlan) -> list[str]:
    """Say what a sized plan is, before it starts."""
    about = plan.sizing
    if about is None:
        raise ValueError("expected a plan that --budget-minutes sized")
    base, costs, seen = plan.base, about["work"]["costs"], about["smallest_effects"]
    steps, tokens = base.total_steps, base.total_steps * base.tokens_per_step
    grid = f", after {len(plan.learning_rates)} learning rates each" if plan.learning_rates else ""
    each = "; ".join(
        f"{name} {cost['start']:.1f} s to start, {cost['step'] * 1000:.1f} ms a step, {cost['test']:.1f} s to test"
        for name, cost in costs.items()
    )
    most = (about["spent_seconds"] + about["at_most_seconds"]) / 60
    return [
        f"measured, {about['work']['workers']} at a time: {each}",
        f"sized for {about['minutes']:g} minutes: {len(plan.arms)} arms, {len(plan.seeds)} seeds, {steps:,} steps, "
        f"{tokens:,} tokens a run{grid}; about {about['expected_seconds'] / 60:.1f} minutes from here, "
        f"{most:.1f} at most with the {about['spent_seconds']:.0f} s spent on measuring",
        f"a difference of {_percent(seen['low'])} to {_percent(seen['high'])} of the value should be found "
        f"{seen['power']:.0%} of the time: that is what a spread of {_percent(seen['spread'][0])} to "
        f"{_percent(seen['spread'][1])} between paired runs comes to, which other comparisons of this kind had; "
        f"shorter runs may have more. The report says it from this comparison's own runs.",
    ]


def _percent(share: float) -> str:
    return f"{share * 100:.2g}%"


def _check(minutes: float, asked: Mapping[str, Any]) -> None:
    if not math.isfinite(minutes) or minutes <= 0:
        raise UserError(f"--budget-minutes: expected a number of minutes above 0, got {minutes:g}")
    if asked.get("steps") is not None:
        raise UserError("--budget-minutes chooses the steps; leave --steps out, or --budget-minutes")
    overrides = asked.get("overrides") or {}
    changes = dict(overrides) if isinstance(overrides, Mapping) else read_changes(overrides)
    for name in ("train.steps", "train.tokens"):
        if name in changes:
            raise UserError(f"--budget-minutes chooses the steps; leave {name} out, or --budget-minutes")


def _begun(layout: Layout, template: ComparePlan, minutes: float) -> ComparePlan | None:
    """Return the plan of a folder that the same request began; None for a folder that has none."""
    if not layout.plan.exists():
        return None
    plan = ComparePlan.load(layout.folder)
    if plan.sizing is None:
        raise UserError(
            f"{layout.folder} holds a comparison that --budget-minutes did not size; choose another output folder, or "
            "leave --budget-minutes out"
        )
    differences = template.differences(ComparePlan.from_dict(plan.sizing["asked"]))
    if plan.sizing["minutes"] != minutes:
        differences.insert(0, f"minutes: {plan.sizing['minutes']:g} there, {minutes:g} here")
    if differences:
        raise UserError(
            f"{layout.folder} holds another comparison ({'; '.join(differences)}); choose another output folder, or "
            "repeat the command that made it"
        )
    return plan


def _build(asked: Mapping[str, Any], size: Size) -> ComparePlan:
    return ComparePlan.build(**{**asked, "steps": size.steps} | ({} if asked.get("seeds") else {"seeds": size.seeds}))


def _choose(template: ComparePlan, asked: Mapping[str, Any], work: Work, minutes: float, spent: float) -> Size:
    given = len(template.seeds) if asked.get("seeds") else None
    fixed_warmup = 0 if _moves(asked, "optim.warmup_steps") else template.base.optim.warmup_steps
    least = max(sizing.LEAST_STEPS, 2 * fixed_warmup)
    rungs = sizing.ladder(template.base.total_steps, seeds=given, least_steps=least)
    size = sizing.choose(rungs, work.most, minutes * 60 - spent)
    if size is None:
        first = rungs[0]
        needed = math.ceil((work.most(first) + spent) / 6) / 10
        raise UserError(
            f"--budget-minutes {minutes:g} is too little for {len(template.arms)} arms here: the smallest comparison, "
            f"{first.seeds} seeds of {first.steps} steps, may take {needed:.1f} minutes with the reserve; give "
            "that, or fewer arms"
        )
    return size


def _moves(asked: Mapping[str, Any], name: str) -> bool:
    """Whether a setting moves with the steps, as `ComparePlan.build` has it: unless the request sets it."""
    overrides = asked.get("overrides") or {}
    return name not in (overrides if isinstance(overrides, Mapping) else read_changes(overrides))


def _measured(template: ComparePlan, asked: Mapping[str, Any], console: Console) -> Work:
    """Prepare the text, build every arm's model, and measure every arm beside the others."""
    from clearhead.compare import costs
    from clearhead.compare.run import prepare_texts, worker_count
    from clearhead.models.pretrained_config import PretrainedConfig

    prepare_texts(template, console)
    costs.resolve(template)
    workers = worker_count(template)
    console.print(f"measuring what a run of each arm costs, {workers} at a time ...", markup=False, highlight=False)
    base = template.base
    return Work(
        costs=measure(template, workers),
        tokens_per_step={arm.name: arm.apply(base).tokens_per_step for arm in template.arms},
        baseline=template.baseline,
        schedule=Schedule(
            steps=base.total_steps,
            eval_every=base.train.eval_every,
            moves=base.train.eval_every > 0 and _moves(asked, "train.eval_every"),
            checkpoint_every=base.train.checkpoint_every,
            before_first=isinstance(base.model, PretrainedConfig),
        ),
        rates=len(template.learning_rates),
        tuning_seeds=template.tuning_seeds if template.learning_rates else 0,
        workers=workers,
    )


def measure(template: ComparePlan, workers: int) -> dict[str, ArmCosts]:
    """Run the pilot of every arm, `workers` at a time; arms are repeated until every worker has been busy.

    Of an arm that was measured more than once the slowest counts.
    """
    names = [arm.name for arm in template.arms]
    jobs = [names[i % len(names)] for i in range(max(len(names), workers))]
    found: dict[str, list[ArmCosts]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        write_json(Path(scratch) / "plan.json", template.identity())
        for start in range(0, len(jobs), workers):
            for name, cost in _together(jobs[start : start + workers], Path(scratch)):
                found[name].append(cost)
    parts = [field.name for field in dataclasses.fields(ArmCosts)]
    return {name: ArmCosts(**{p: max(getattr(c, p) for c in each) for p in parts}) for name, each in found.items()}


def _together(names: Sequence[str], scratch: Path) -> Iterator[tuple[str, ArmCosts]]:
    with contextlib.ExitStack() as held:
        running = []
        for number, name in enumerate(names):
            out, errors = scratch / f"{number}.json", scratch / f"{number}.txt"
            out.unlink(missing_ok=True)
            process = subprocess.Popen(
                [sys.executable, "-m", "clearhead.compare.pilot", str(scratch), name, str(out)],
                env=environment_of_worker(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=held.enter_context(open(errors, "wb")),
                start_new_session=True,
            )
            held.callback(_end, process)
            running.append((name, process, out, errors, time.monotonic()))
        waiting, ended = list(running), {}
        while waiting:
            for job in [job for job in waiting if job[1].poll() is not None]:
                waiting.remove(job)
                ended[job[2]] = time.monotonic() - job[4]
            time.sleep(0.05)
        for name, process, out, errors, _ in running:
            if process.returncode:
                last = (errors.read_text(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"])[
                    -1
                ]
                raise UserError(f"arm {name!r} cannot be measured: {last}")
            parts = json.loads(out.read_text(encoding="utf-8"))
            inner = parts.pop("inner")
            yield name, ArmCosts(start=max(0.0, ended[out] - inner), **parts)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave no process behind when the command is stopped while it measures."""
    if process.poll() is None:
        process.kill()
        process.wait()
