"""`--budget-minutes`: what it refuses, what it writes, and that a stopped comparison keeps its sizes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from clearhead import cli
from clearhead.compare import budget, pilot, run
from clearhead.compare.budget import sized
from clearhead.compare.layout import Layout
from clearhead.compare.plan import ComparePlan
from clearhead.compare.results import collect
from clearhead.compare.sizing import ArmCosts
from clearhead.errors import UserError
from tests.compare import test_run
from tests.page import Page

text, in_process, _own_cache = test_run.text, test_run.in_process, test_run._own_cache  # fixtures

TINY = {
    "model.layers": 1, "model.width": 16, "model.heads": 2, "model.context": 32, "data.context": 32,
    "data.val_fraction": 0.2, "data.test_fraction": 0.2, "train.eval_tokens": 256, "train.test_tokens": 512,
}  # fmt: skip
COST = ArmCosts(start=3.0, step=0.05, evaluation=0.5, checkpoint=0.1, test=2.0)


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """Costs that are given, not measured; how often they were asked for."""
    asked: list[int] = []

    def give(template, workers):
        asked.append(workers)
        return {arm.name: COST for arm in template.arms}

    monkeypatch.setattr(budget, "measure", give)
    return asked


def request(text, folder, **changes):
    return {
        "attention": ["softmax", "laser"], "data": str(text), "overrides": TINY, "workers": 1, "folder": folder
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "100"], "leave --steps out"),
        (["--set", "train.steps=100"], "leave train.steps out"),
        (["--set", "train.tokens=100"], "leave train.tokens out"),
        (["--budget", "flops"], "same tokens; leave --budget out"),
        (["--budget-minutes", "0"], "above 0"),
        (["--budget-minutes", "nan"], "above 0"),
    ],
)
def test_requests_that_contradict_themselves_are_one_line(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [] if "--budget-minutes" in options else ["--budget-minutes", "5"]
    assert cli.main(["compare", *given, *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("measured")
def test_too_little_time_names_the_smallest_that_will_do(text, tmp_path):
    with pytest.raises(UserError, match=r"too little for 2 arms.* 3 seeds of 100 steps, may take") as caught:
        sized(1, progress=False, **request(text, tmp_path / "c"))
    needed = float(str(caught.value).split("may take ")[1].split()[0])
    plan = sized(needed + 0.1, progress=False, **request(text, tmp_path / "c"))
    assert len(plan.seeds) == 3
    assert 100 <= plan.base.total_steps < 150


def test_seeds_that_are_given_are_kept_and_steps_fill_the_time(text, tmp_path, measured):
    plan = sized(20, progress=False, **request(text, tmp_path / "c", seeds=4))
    assert plan.seeds == (0, 1, 2, 3)
    assert plan.base.optim.warmup_steps == plan.base.total_steps // 10
    longer = sized(40, progress=False, **request(text, tmp_path / "d", seeds=4))
    assert longer.base.total_steps > plan.base.total_steps
    assert measured == [1, 1]
    about = plan.sizing
    assert about["spent_seconds"] + about["at_most_seconds"] <= 20 * 60
    assert 0 < about["smallest_effects"]["low"] < about["smallest_effects"]["high"]


@pytest.mark.usefixtures("in_process")
def test_the_sizes_stand_in_the_plan_and_the_same_command_keeps_them(text, tmp_path, measured, monkeypatch, capsys):
    folder = tmp_path / "c"
    asked = request(text, folder, seeds=2)
    monkeypatch.setattr(budget.sizing, "LEAST_STEPS", 4)
    monkeypatch.setattr(budget.sizing, "LEAST_SHARE", 0.0)
    monkeypatch.setattr(budget.sizing, "MOST_SHARE", 0.01)
    plan = sized(3, **asked)
    said = " ".join(capsys.readouterr().out.split())
    assert f"2 arms, 2 seeds, {plan.base.total_steps} steps" in said
    assert "found 80% of the time" in said
    assert plan.base.total_steps <= 16
    run.compare(plan, progress=False)
    stored = json.loads((folder / "plan.json").read_text())
    assert stored["sizing"]["minutes"] == 3
    assert stored["sizing"]["work"]["costs"]["laser"]["step"] == COST.step
    assert stored["base"]["train"]["steps"] == plan.base.total_steps
    assert collect(folder)["sizing"] == stored["sizing"]
    page = Page((folder / "report.html").read_text())
    assert "chosen so that all of it would end within 3 minutes" in " ".join(page.text.split())

    monkeypatch.setattr(budget, "measure", lambda *_: pytest.fail("measured again"))
    again = sized(3, progress=False, **asked)
    assert again.identity() == plan.identity()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/*")}
    run.compare(again, progress=False)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/*")} == before
    assert json.loads((folder / "plan.json").read_text()) == stored
    with pytest.raises(UserError, match="minutes: 3 there, 4 here"):
        sized(4, progress=False, **asked)
    with pytest.raises(UserError, match=r"seeds: \[0, 1\] there, \[0, 1, 2\] here"):
        sized(3, progress=False, **{**asked, "seeds": 3})


def test_a_comparison_that_was_not_sized_is_refused(text, tmp_path, measured):
    layout = Layout(tmp_path)
    layout.plan.write_text(ComparePlan.build(attention=["softmax", "laser"]).to_json())
    with pytest.raises(UserError, match="did not size"):
        sized(5, progress=False, **request(text, tmp_path))
    assert not measured


def test_folders_of_sized_comparisons_are_named_by_the_request():
    assert str(budget.default_folder(ComparePlan.build(), 5)) == "compare-default-5min"
    other = str(budget.default_folder(ComparePlan.build(attention=["softmax", "laser"]), 2.5))
    assert other.startswith("compare-default-2.5min-")


def test_every_part_of_a_run_is_measured_on_the_arm_itself(text):
    plan = ComparePlan.build(**request(text, None))
    parts = pilot.measure(plan, "laser")
    assert set(parts) == {"step", "evaluation", "test", "checkpoint", "inner"}
    assert all(value > 0 for value in parts.values())
    assert parts["inner"] >= pilot.LEAST_STEPS * parts["step"]
    assert parts["test"] / parts["evaluation"] == pytest.approx(512 / 256)


@pytest.mark.full
def test_a_pretrained_model_is_sized_too(tmp_path):
    """The command itself: pilots, sizes, three short fine-tuning runs of each arm, a report."""
    pytest.importorskip("peft", reason="pip install 'clearhead[hf]'")
    from tests.hf.tiny_lm import write_model, write_texts

    words = write_texts(tmp_path / "text", documents=20)
    model = write_model(tmp_path / "model", words)
    options = ["--attention", "softmax", "softmax+learned", "--set", "train.test_tokens=512", "train.eval_tokens=256"]
    command = ["compare", "--budget-minutes", "60", "--model", str(model), "--data", str(words), "--seeds", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget.sizing, "MOST_SHARE", 0.01)  # not really an hour
        assert cli.main([*command, *options, "--workers", "1", "--out", str(tmp_path / "out")]) == 0
    results = collect(tmp_path / "out")
    assert results["complete"]
    assert results["sizing"]["smallest_effects"]["kind"] == "fine-tuning"
    assert results["sizing"]["work"]["schedule"]["before_first"] is True


@pytest.mark.full
def test_pilots_run_beside_each_other_and_their_start_is_counted(text):
    costs = budget.measure(ComparePlan.build(**request(text, None)), 2)
    assert list(costs) == ["softmax", "laser"]
    assert all(cost.start > cost.step > 0 for cost in costs.values())


def test_an_arm_that_cannot_be_measured_is_named(text, monkeypatch):
    class Broken(subprocess.Popen):
        def __init__(self, command, **options):
            super().__init__([sys.executable, "-c", "import sys; sys.exit('no memory left')"], **options)

    monkeypatch.setattr(budget.subprocess, "Popen", Broken)
    with pytest.raises(UserError, match="arm 'softmax' cannot be measured: no memory left"):
        budget.measure(ComparePlan.build(**request(text, None)), 1)
