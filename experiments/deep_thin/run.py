"""Deep-thin with DeepScaleLM against shallow-wide: `python -m experiments.deep_thin.run`.

Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from clearhead.errors import UserError
from experiments.deep_thin.figure import draw
from experiments.deep_thin.images import load
from experiments.deep_thin.judge import choose, judge, wanted
from experiments.deep_thin.settings import CHOOSING_SEED, SETTINGS, Setting, quick
from experiments.deep_thin.speed import ROUNDS, measure
from experiments.deep_thin.tables import tables
from experiments.running import about, put_results, read_runs, run_missing

HERE = Path(__file__).parent
Job = tuple[Setting, str, float, int, Path]


def train_one(job: Job) -> dict[str, Any]:
    """Train one arm with one learning rate and seed."""
    setting, name, rate, seed, work = job
    torch.set_num_threads(1)
    judged, arm = seed != CHOOSING_SEED, setting.arm(name)
    if setting.config(arm).architecture != "encoder":
        from experiments.deep_thin.text_runs import train_text

        row = train_text(setting, arm, rate, seed, work, judged=judged)
    else:
        from experiments.deep_thin.image_runs import train_images

        row = train_images(setting, arm, rate, seed, judged=judged)
    return {"task": setting.name, "arm": name, "rate": rate, "seed": seed, "steps": setting.steps, **row}


def key_of_run(run: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a run this run."""
    return (run["task"], run["arm"], run["rate"], run["seed"], run["steps"])


def run_setting(setting: Setting, path: Path, work: Path, workers: int) -> None:
    """Run what a task still lacks: first the grid of learning rates, then the seeds that count, then what a verdict
    between different rates waits for.

    Raises `UserError` when its data are not here.
    """

    def run(jobs: list[Job]) -> None:
        run_missing(
            path,
            jobs,
            train_one,
            key_of_job=lambda job: (job[0].name, job[1], job[2], job[3], job[0].steps),
            key_of_run=key_of_run,
            workers=workers,
        )

    if setting.name == "language":
        _run_language(setting, path, work, workers)
    else:
        _prepare(setting)
        run([(setting, arm.name, rate, CHOOSING_SEED, work) for rate in setting.rates for arm in setting.arms])
        rates = {arm.name: choose(setting, arm, read_runs(path)) for arm in setting.arms}
        run([(setting, arm.name, rates[arm.name], s, work) for s in range(setting.seeds) for arm in setting.arms])
    pairs = wanted(setting, read_runs(path))
    run([(setting, name, rate, seed, work) for name, rate in pairs for seed in range(setting.seeds)])


def _prepare(setting: Setting) -> None:
    """Raise `UserError` when the task's data are not here."""
    if setting.config(setting.arms[0]).architecture == "encoder":
        load(setting.source)
    else:
        from clearhead.data.pairs import prepare_pairs
        from experiments.deep_thin.text_runs import run_config

        prepare_pairs(run_config(setting, setting.arms[0], setting.rates[0], 0, judged=False).data, progress=print)


def _run_language(setting: Setting, path: Path, work: Path, workers: int) -> None:
    from experiments.deep_thin.text_runs import compare_language

    runs = read_runs(path)
    done = {key_of_run(run) for run in runs}
    asked = [(arm.name, rate, CHOOSING_SEED) for arm in setting.arms for rate in setting.rates]
    asked += [(arm.name, choose(setting, arm, runs), seed) for arm in setting.arms for seed in range(setting.seeds)]
    if all((setting.name, *key, setting.steps) in done for key in asked):
        return
    rows = compare_language(setting, work, workers)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows if key_of_run(row) not in done)


def main() -> None:
    """Run the tasks and write results, tables and figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a minute, tiny models, into a folder that is thrown away")
    parser.add_argument("--out", type=Path, default=None, help="for results; default: results/ here, with the README")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="for the trainer's run folders")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as thrown_away:
        out = asked.out or (Path(thrown_away) / "results" if asked.quick else HERE / "results")
        work = Path(thrown_away) / "work" if asked.quick else asked.work
        out.mkdir(parents=True, exist_ok=True)
        for name in asked.tasks:
            setting = quick(SETTINGS[name]) if asked.quick else SETTINGS[name]
            try:
                run_setting(setting, out / "runs.jsonl", work, asked.workers)
            except UserError as error:
                print(f"{setting.name} is left out: {error}")
        write(out, quick_run=asked.quick, into_readme=out == HERE / "results")


def write(out: Path, *, quick_run: bool, into_readme: bool) -> None:
    """Write results.json and the figure from the runs that are there; the README too if asked.

    The speed of a step is measured once, and kept in speed.json.
    """
    runs = read_runs(out / "runs.jsonl")
    settings = [quick(setting) if quick_run else setting for setting in SETTINGS.values()]
    settings = [setting for setting in settings if any(run["task"] == setting.name for run in runs)]
    path = out / "speed.json"
    speed = json.loads(path.read_text()) if path.exists() else {}
    for setting in settings:
        if setting.name not in speed:
            found = measure(setting, rounds=3 if quick_run else ROUNDS)
            speed[setting.name] = {
                name: {key: value for key, value in arm.items() if key != "seconds"} for name, arm in found.items()
            }
    path.write_text(json.dumps(speed, indent=1) + "\n")
    results = [result for setting in settings if (result := judge(setting, runs, speed[setting.name])) is not None]
    made = {
        **about(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a run",
        "seconds": round(sum(float(run["seconds"]) for run in runs)),
        "tasks": results,
    }
    (out / "results.json").write_text(json.dumps(made, indent=1) + "\n")
    (out / "differences.svg").write_text(draw(results))
    lines = tables(results)
    print("\n".join(lines))
    if into_readme:
        put_results(HERE / "README.md", lines)


if __name__ == "__main__":
    main()
