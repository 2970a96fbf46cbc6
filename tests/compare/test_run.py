"""Real comparisons, as small as they can be: worker processes that train, stop, go on, diverge and crash."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clearhead.compare import pool, probe, run
from clearhead.compare.layout import Layout
from clearhead.compare.plan import ComparePlan
from clearhead.compare.pool import Task, run_tasks
from clearhead.compare.records import load_record
from clearhead.compare.run import compare, hold
from clearhead.compare.verdict import Status
from clearhead.errors import UserError
from tests.compare.test_report import Page, strict

ATTENTION = ("softmax", "laser")
HOT = "hot: optim.lr=1e30 optim.clip_norm=none"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(7)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(40)]
    for number in range(10):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words, k=300)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLEARHEAD_DATA", str(tmp_path_factory.mktemp("prepared")))
        yield


def small(text: Path, **changes) -> ComparePlan:
    overrides = {
        "model.layers": 1, "model.width": 16, "model.heads": 2, "model.context": 32, "data.context": 32,
        "data.val_fraction": 0.2, "data.test_fraction": 0.2, "train.eval_tokens": 256, "train.test_tokens": 512,
        "train.checkpoint_every": 0,
    }  # fmt: skip
    wanted = {"attention": ATTENTION, "arms": [HOT], "seeds": 2, "steps": 10, "workers": 2, "data": str(text)}
    return ComparePlan.build(overrides=overrides, **(wanted | changes))


@pytest.fixture
def in_process(monkeypatch) -> None:
    """Train in this process instead of in workers, whose start costs seconds: for tests of what comes around it."""
    from clearhead.train.config import RunConfig
    from clearhead.train.loop import train

    def run_here(tasks, workers, *, on_tick=None, on_end=None) -> None:
        for task in tasks:
            train(RunConfig.from_dict(task.config), task.folder, progress=False)
            on_end(task, 0)

    def measure_here(layout, console):
        if not layout.probe.exists():
            pool.write_json(layout.probe, probe.probe(ComparePlan.load(layout.folder)))
        return json.loads(layout.probe.read_text())["arms"]

    monkeypatch.setattr(run, "run_tasks", run_here)
    monkeypatch.setattr(run, "measure_speed", measure_here)


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "whole"
    compare(small(text), folder, progress=False)
    return folder


def test_a_generated_task_is_judged_by_bits_per_answer(in_process, tmp_path):
    plan = small("synthetic:state,sequences=4", arms=[], attention=ATTENTION, steps=3)
    results = compare(plan, tmp_path / "state", progress=False)
    assert (results["score"], results["unit"]) == ("bits_per_answer", "bits per answer")
    row = results["runs"][0]
    run_folder = tmp_path / "state" / "runs" / row["folder"].split("runs/")[-1]
    summary = json.loads((run_folder / "result.json").read_text())["summary"]
    assert row["test_bits_per_answer"] == summary["test_bits_per_answer"]
    assert row["test_accuracy"] == summary["test_accuracy"]
    assert "test_bits_per_byte" not in row
    assert [run["status"] for run in results["runs"]] == ["finished"] * 4
    other = next(arm for arm in results["arms"] if not arm["baseline"])
    assert "bits per answer" in other["comparison"]["sentence"]
    page = (tmp_path / "state" / "report.html").read_text()
    assert "Validation bits per answer" in page
    assert "per byte" not in page
    assert re.search(r">4<.{0,20} sequences", page)


def test_a_comparison_ends_in_a_report_though_one_arm_diverges(finished):
    results = strict((finished / "results.json").read_text())
    arms = {arm["name"]: arm for arm in results["arms"]}
    assert results["complete"] is True
    assert arms["hot"]["status"] == {"finished": 0, "diverged": 2, "crashed": 0, "missing": 0}
    assert arms["hot"]["comparison"]["verdict"] == "diverged"
    assert arms["laser"]["status"]["finished"] == 2
    for name in ATTENTION:
        runs = [json.loads((finished / f"runs/{name}/seed{s}/result.json").read_text())["summary"] for s in (0, 1)]
        assert arms[name]["test"]["mean"] == pytest.approx(sum(run["test_bits_per_byte"] for run in runs) / 2)
        assert arms[name]["curves"]["validation"]["tokens"][-1] == 10 * 4 * 32
        assert arms[name]["gradient"]["steps"] == 2 * 10
        assert arms[name]["setup"]["parameters"]["total"] > 1000
        assert arms[name]["peak_memory"]["n"] == 2
    difference = arms["laser"]["test"]["mean"] - arms["softmax"]["test"]["mean"]
    assert arms["laser"]["comparison"]["mean"] == pytest.approx(difference)
    page = Page((finished / "report.html").read_text())
    assert "hot diverged" in page.text


def test_documents_weighted_by_bytes_give_the_value_that_is_compared(finished):
    from clearhead.compare.statistics import bits_per_byte

    record = load_record(finished / "runs/softmax/seed0", "softmax", 0)
    nats, sizes = ([document[key] for document in record.documents] for key in ("nats", "bytes"))
    assert record.test == pytest.approx(bits_per_byte(nats, sizes))


def test_runs_of_a_seed_share_their_data_and_start(finished):
    def first_loss(name: str, seed: int) -> float:
        return float(load_record(finished / f"runs/{name}/seed{seed}", name, seed).train["loss"][0])

    assert first_loss("softmax", 0) == first_loss("hot", 0)  # the same function, before the first update
    assert first_loss("softmax", 0) != first_loss("softmax", 1)


def test_the_speed_probe_measured_every_arm_with_one_thread(finished):
    measured = json.loads((finished / "probe.json").read_text())
    assert measured["threads"] == 1
    assert measured["rounds"] >= 9
    assert measured["load_before"] is not None
    for arm in measured["arms"].values():
        assert len(arm["seconds"]) == measured["rounds"]
        assert 0 < arm["min_seconds"] <= arm["median_seconds"]
    assert measured["arms"]["softmax"]["ratio"] == 1.0


def test_the_same_command_again_trains_nothing(finished, text):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("runs/*/*/*")}
    sessions = (finished / "sessions.jsonl").read_text()
    results = compare(small(text, workers=1), finished, progress=False)
    assert {path: path.stat().st_mtime_ns for path in finished.glob("runs/*/*/*")} == before
    assert (finished / "sessions.jsonl").read_text() == sessions
    assert results == strict((finished / "results.json").read_text())


def test_another_plan_is_refused_and_nothing_is_touched(finished, text):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"seeds: \[0, 1\] there, \[0, 1, 2\] here.*choose another output folder"):
        compare(small(text, seeds=3), finished, progress=False)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_a_folder_with_other_things_is_refused(tmp_path, text):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no comparison"):
        compare(small(text), tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_at_work_is_refused(tmp_path, text):
    with hold(Layout(tmp_path)), pytest.raises(UserError, match="is at work"):
        compare(small(text), tmp_path, progress=False)


def test_bad_text_and_impossible_arms_leave_nothing_behind(tmp_path, text):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError):
        compare(small(text, data=str(tmp_path / "empty.txt")), tmp_path / "a", progress=False)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UserError, match="too little text"):
        compare(small(text, data=str(tmp_path / "short.txt")), tmp_path / "b", progress=False)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


# A job in a shell's background ignores Ctrl-C, and so do its children: the command must listen wherever tests run.
SCRIPT = """
import signal
import sys
from pathlib import Path
from clearhead.compare.plan import ComparePlan
from clearhead.compare.run import compare
signal.signal(signal.SIGINT, signal.default_int_handler)
compare(ComparePlan.load(Path(sys.argv[1])), sys.argv[1], progress=False)
"""


@pytest.mark.usefixtures("in_process")
def test_ctrl_c_saves_and_the_same_command_goes_on(text, tmp_path):
    """Stopped in mid-training by a signal to the command; then the same plan again, to its end."""
    plan, folder = small(text, arms=[], steps=900), tmp_path / "c"
    folder.mkdir()
    (folder / "plan.json").write_text(plan.to_json())
    pool.write_json(folder / "probe.json", {"failed": "left out by this test", "arms": {}})
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = folder / "runs" / "laser" / "seed0" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert process.returncode != 0
    record = load_record(metrics.parent, "laser", 0)
    assert record.status is Status.MISSING
    assert list(metrics.parent.glob("checkpoint*")), "the worker saved before it stopped"
    assert 5 <= record.steps < 900
    assert "unfinished" in (folder / "report.html").read_text()

    results = compare(plan, folder, progress=False)
    assert results["complete"] is True
    assert json.loads((metrics.parent / "result.json").read_text())["summary"]["starts"] == 2, "it went on, not anew"
    assert load_record(metrics.parent, "laser", 0).train["steps"].tolist() == list(range(1, 901))
    assert len(results["sessions"]) == 2


def tasks_of(text: Path, folder: Path, **steps: int) -> list[Task]:
    from clearhead.compare.costs import run_config

    base = small(text).base
    return [
        Task(name, 0, folder / name, run_config(base, steps=n, seed=0, rate=None).to_dict(), n)
        for name, n in steps.items()
    ]


def test_crashed_workers_do_not_stop_the_rest_and_say_why(text, tmp_path):
    broken, killed, good = tasks_of(text, tmp_path, broken=5, killed=100_000, good=5)
    broken = dataclasses.replace(broken, config={**broken.config, "modle": {}})
    codes: dict[str, int] = {}

    def kill(running, waiting) -> None:
        for worker in running:
            if worker.task.arm == "killed" and (worker.task.folder / "metrics.jsonl").exists():
                os.kill(worker.process.pid, signal.SIGKILL)

    run_tasks([broken, killed, good], 2, on_tick=kill, on_end=lambda task, code: codes.update({task.arm: code}))
    assert codes == {"broken": 2, "killed": -signal.SIGKILL, "good": 0}
    records = {task.arm: load_record(task.folder, task.arm, 0) for task in (broken, killed, good)}
    assert records["broken"].status is records["killed"].status is Status.CRASHED
    assert "did you mean 'model'" in records["broken"].reason
    assert "SIGKILL" in records["killed"].reason
    assert records["good"].status is Status.FINISHED
    assert (tmp_path / "broken" / "stderr.txt").read_text().strip()


def test_workers_save_and_stop_when_the_command_that_started_them_is_killed(text, tmp_path):
    (task,) = tasks_of(text, tmp_path, alone=100_000)
    task.folder.mkdir()
    pool.write_json(task.folder / "task.json", {"arm": task.arm, "seed": 0, "config": task.config})
    script = '"$0" -m clearhead.compare.worker "$1" $$ & read line'
    parent = subprocess.Popen(
        ["sh", "-c", script, sys.executable, str(task.folder)], stdin=subprocess.PIPE, env=pool.environment_of_worker()
    )
    metrics, deadline = task.folder / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 5):
        time.sleep(0.05)
    parent.kill()
    parent.communicate()
    while time.monotonic() < deadline and not list(task.folder.glob("checkpoint/step-*")):
        time.sleep(0.05)
    assert list(task.folder.glob("checkpoint/step-*"))
    assert not (task.folder / "result.json").exists()


def test_ratios_are_taken_within_a_round():
    figures = probe.summarise({"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 8.0]}, "a", {"a": 10, "b": 10})
    assert (figures["b"]["ratio"], figures["b"]["ratio_low"], figures["b"]["ratio_high"]) == (2.0, 2.0, 2.0)
    assert figures["b"]["min_seconds"] == 2.0
    assert figures["b"]["tokens_per_second"] == 2.5


@pytest.mark.usefixtures("in_process")
def test_a_time_budget_and_a_grid_of_rates(text, tmp_path):
    plan = small(text, arms=[], budget="time", learning_rates=[1e-3, 1e-2], seeds=2)
    plan = dataclasses.replace(plan, tuning_seeds=1)
    results = compare(plan, tmp_path / "c", progress=False)
    speed = results["probe"]["arms"]
    steps = {arm["name"]: arm["setup"]["steps"] for arm in results["arms"]}
    assert steps["softmax"] == 10
    share = speed["softmax"]["median_seconds"] / speed["laser"]["median_seconds"]
    assert steps["laser"] == max(1, round(10 * share))
    for arm in results["tuning"]["arms"]:
        rows = {row["rate"]: row["val"] for row in arm["rates"]}
        assert arm["chosen"] == min(rows, key=rows.__getitem__)
        used = [run["learning_rate"] for run in results["runs"] if run["arm"] == arm["name"]]
        assert used == [arm["chosen"]] * 2
        tuned = tmp_path / "c" / "tuning" / arm["name"] / "lr0.001-seed1000" / "result.json"
        assert json.loads(tuned.read_text())["summary"]["test_tokens"] <= 32, "tuning leaves the test text alone"
