"""The registry holds what it says, and every rival gives our result before it may be timed."""

import dataclasses
import importlib.util
import json
import random

import pytest
import torch

from clearhead.bench import contest as contests
from clearhead.bench.contest import Contest
from clearhead.bench.plan import MODELS, Group, Model, Plan, Shape
from clearhead.bench.registry import (
    COMPETITORS,
    DEFAULT_SPECS,
    FAMILIES,
    OPERATIONS,
    SOURCES,
    Competitor,
    competitors,
    of_specs,
)
from clearhead.bench.run import run, to_json
from clearhead.bench.timing import Clock, interleaved, summarise
from clearhead.errors import UserError
from clearhead.models.config import ModelConfig

TINY_CONFIG = ModelConfig(layers=1, width=32, heads=2, context=16)
TINY = dataclasses.replace(MODELS["compare"], config=TINY_CONFIG, batch_size=2)
NAMES = {one.name: one for one in COMPETITORS}


def on(operation):
    return TINY if operation == "step" else Shape(2, 2, 40, 16)


def prepared(one: Competitor, operation: str, where: Shape | Model | None = None) -> Contest:
    contest = Contest(Group(operation, where or on(operation), (one,)), seed=1)
    contest.prepare()
    return contest


def test_what_the_bench_promises_is_in_the_registry():
    assert set(OPERATIONS) == {"forward", "forward+backward", "decode", "step"}
    found = {(one.source, one.option) for one in COMPETITORS}
    for spec in DEFAULT_SPECS:
        assert ("clearhead", spec) in found
        assert ("written-out", spec) in found
    for kind in ("flash", "no flash", "laser flash", "laser no flash"):
        assert ("x-transformers", kind) in found
    assert {("transformers", "eager"), ("transformers", "sdpa"), ("nanogpt", "sdpa"), ("torch", "")} <= found
    for operation in OPERATIONS.values():
        assert operation.name in NAMES[operation.baseline].operations
        assert {one.source for one in COMPETITORS if operation.name in one.operations} >= {"clearhead", "transformers"}


def test_names_are_unique_and_every_reference_exists():
    assert len(NAMES) == len(COMPETITORS)
    for one in COMPETITORS:
        assert one.family in FAMILIES
        assert one.source in SOURCES
        assert set(one.operations) <= set(OPERATIONS)
        assert one.equals is None or one.equals in NAMES
        assert not one.beside or NAMES[one.beside].source == "clearhead"
        assert one.equals is not None or one.note, "another formula, and no word about it"


@pytest.mark.parametrize(
    ("name", "operation"),
    [(one.name, operation) for one in COMPETITORS if one.source != "compiled" for operation in one.operations],
)
def test_every_competitor_gives_our_result_or_says_that_it_does_not(name, operation):
    one = NAMES[name]
    if not one.of.installed:
        pytest.skip(f"{one.of.package} is not installed")
    contest = prepared(one, operation)
    assert contest.absent == []
    (entry,) = contest.entries
    if one.source == "clearhead":
        return
    assert (entry.difference is None) == (one.equals is None)
    if one.equals is not None:
        assert entry.difference < 1e-5
    entry.run()  # once more: a cache was left as it was


@pytest.mark.parametrize("spec", ["softmax", "laser+selective", "self_adjust", "softmax+window:8"])
def test_a_decode_step_answers_what_the_whole_attention_answers_last(spec):
    ours = next(one for one in of_specs([spec]) if one.source == "clearhead")
    shape = Shape(1, 2, 24, 16)
    full = Contest(Group("forward", shape, (ours,)), seed=3).build(ours)[1][0]
    one_token = Contest(Group("decode", shape, (ours,)), seed=3)
    for name in (spec, f"{spec} written out"):
        rival = next(one for one in of_specs([spec]) if one.name == name)
        out = one_token.build(rival)[1][0]
        torch.testing.assert_close(out, full[:, :, -1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_types_pass_the_check_too(dtype):
    names = ("laser written out", "self_adjust written out", "softmax+selective written out", "transformers eager")
    for name in names:
        if NAMES[name].of.installed:
            assert prepared(NAMES[name], "forward+backward", Shape(1, 2, 32, 16, dtype)).absent == []


@pytest.mark.parametrize("operation", ["forward", "forward+backward", "decode", "step"])
def test_a_rival_that_computes_something_else_is_not_timed(operation, monkeypatch):
    wrong = NAMES["laser written out"] if operation != "step" else NAMES["nanoGPT-style, laser written out"]
    contest = prepared(dataclasses.replace(wrong, equals="softmax"), operation)
    assert contest.entries == []
    assert contest.absent[0].status == "differs"
    assert "differs from ours by" in contest.absent[0].reason


def test_a_rival_that_fails_is_listed_and_our_own_failure_is_raised(monkeypatch):
    def broken(option, problem):
        raise ZeroDivisionError("no such thing")

    for source, name in (("written_out", "laser written out"), ("ours", "laser")):
        module = importlib.import_module(f"clearhead.bench.sources.{source}")
        monkeypatch.setattr(module, "attention", broken)
        if source == "ours":
            with pytest.raises(ZeroDivisionError):
                prepared(NAMES[name], "forward")
        else:
            assert prepared(NAMES[name], "forward").absent[0].reason == "ZeroDivisionError: no such thing"


def test_a_missing_rival_is_listed_with_how_to_install_it(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "x_transformers" else real(name))
    absent = prepared(NAMES["x-transformers laser, flash"], "forward").absent
    assert [(one.status, one.reason) for one in absent] == [("not installed", "pip install 'clearhead[bench]'")]


def test_specs_of_ones_own_bring_their_written_out_form_and_no_strangers():
    names = {one.name for one in competitors(["self_adjust:form=minmax+window:8"], ["written-out", "x-transformers"])}
    assert "self_adjust:form=minmax+window:8 written out" in names
    assert {"torch sdpa", "x-transformers, flash", "softmax"} <= names
    assert not any("laser" in name for name in names)
    for spec in ("performer", "bigbird:block_size=8", "self_adjust:form=min_shift+window:8+selective"):
        ours = next(one for one in of_specs([spec]) if one.source == "clearhead")
        for operation in ours.operations:
            if operation != "step":
                assert prepared(ours, operation).absent == []
        assert all(prepared(one, "forward+backward").absent == [] for one in of_specs([spec]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"operations": ("backwards",)}, "unknown operation 'backwards'"),
        ({"specs": ("lasr",)}, "did you mean 'laser'?"),
        ({"rivals": ("nanogtp",)}, "did you mean 'nanogpt'?"),
        ({"models": ("huge",)}, "unknown model 'huge'"),
        ({"lengths": (64, 64)}, "each once, got 64, 64"),
        ({"lengths": (1,)}, "lengths of at least 2"),
        ({"heads": 0}, "of at least 1"),
        ({"rounds": 2}, "at least 3 rounds"),
    ],
)
def test_a_plan_refuses_what_makes_no_sense(changes, words):
    with pytest.raises(UserError) as refused:
        Plan(**changes)
    assert words in str(refused.value)


def test_a_whole_bench_in_small(tmp_path):
    plan = Plan(
        operations=("forward+backward", "decode"), specs=("laser",), rivals=("written-out",), lengths=(32, 64), heads=2,
        head_dim=16, rounds=3, seconds=0.0,
    )  # fmt: skip
    found = run(plan)
    assert [(group["operation"], group["length"]) for group in found["groups"]] == [
        ("forward+backward", 32), ("forward+backward", 64), ("decode", 32), ("decode", 64),
    ]  # fmt: skip
    for group in found["groups"]:
        assert list(group["results"]) == ["torch sdpa", "laser", "laser written out"]
        for one in group["results"].values():
            assert len(one["seconds"]) == group["rounds"] == 3
            assert one["median_ratio"] > 0
        assert group["results"]["torch sdpa"]["median_ratio"] == 1.0
    assert json.loads(to_json(found))["plan"]["lengths"] == [32, 64]


def test_memory_is_told_by_a_process_that_starts_clean():
    from clearhead.bench import peak

    if not peak.possible():
        pytest.skip("the high-water mark cannot be set back here")
    shape = Shape(1, 2, 1024, 16)
    matrix = shape.heads * shape.length**2 * 4
    with peak.PeakServer([]) as server:
        dense, ours, again = (
            server.ask(Group("forward", shape, (NAMES[name],)), NAMES[name], 0)
            for name in ("softmax written out", "softmax", "softmax written out")
        )
    assert 2 * matrix <= dense <= 6 * matrix  # scores, hidden, weights
    assert ours < matrix / 4
    assert abs(again - dense) < matrix / 4


def test_a_measurement_of_memory_that_fails_says_why():
    from clearhead.bench import peak

    if not peak.possible():
        pytest.skip("the high-water mark cannot be set back here")
    shape, one = Shape(1, 2, 16, 16), NAMES["softmax"]
    with peak.PeakServer([]) as server:
        with pytest.raises(RuntimeError, match=r"peak memory of softmax: .*'nonsense'"):
            server.ask(Group("forward", shape, (one,)), dataclasses.replace(one, option="nonsense"), 0)
        assert server.ask(Group("forward", shape, (one,)), one, 0) is not None
    with peak.PeakServer(["no_such_package"]) as server, pytest.raises(RuntimeError, match="no_such_package"):
        server.ask(Group("forward", shape, (one,)), one, 0)


def test_rounds_are_shuffled_and_everyone_is_in_each():
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    ticks = iter(range(10_000))
    clock = Clock(lambda: next(ticks) * 1.0, lambda: None, "ticks")  # a call takes a second: no repeats
    times = interleaved(runs, clock, rounds=20, most=20, seconds=0.0, seed=0)
    rounds = [tuple(calls[i : i + 3]) for i in range(3, len(calls), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 3
    assert {len(one) for one in times.seconds.values()} == {20}


def test_ratios_are_taken_within_rounds():
    noise = [random.Random(0).uniform(1, 10) for _ in range(9)]
    figures = summarise([2 * x for x in noise], noise)
    assert figures["median_ratio"] == figures["low_ratio"] == figures["high_ratio"] == figures["min_ratio"] == 2.0
    assert figures["min_seconds"] == 2 * min(noise)


def test_a_result_that_is_not_finite_is_no_result():
    ours = torch.ones(2, 2)
    assert contests.difference(torch.full((2, 2), float("nan")), ours) == float("inf")
    assert contests.difference(torch.ones(2, 3), ours) == float("inf")
    assert contests.difference(torch.full((2, 2), 1.5), ours) == 0.5
