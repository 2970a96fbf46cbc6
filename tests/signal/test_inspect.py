"""Findings, advice and the whole of `inspect`: what is broken is found, what is advised holds, nothing is touched."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from clearhead.cli import main
from clearhead.errors import UserError
from clearhead.init.apply import init_
from clearhead.models.config import PRESETS, ModelConfig
from clearhead.models.make import build_model
from clearhead.signal import words
from clearhead.signal.findings import KINDS, Finding
from clearhead.signal.inspection import inspect, predict
from clearhead.signal.moments.types import GradientMoments, Moments
from clearhead.signal.observed import observations
from clearhead.signal.trace import Trace
from clearhead.signal.verdicts import THRESHOLDS, judge, verdict_of

BROKEN = ModelConfig(
    vocab_size=257,
    context=32,
    layers=30,
    width=32,
    heads=2,
    feed_forward="relu",
    norm="layer",
    norm_placement="post",
    init="xavier",
)


def kinds(trace: Trace) -> dict[str, str]:
    return {finding.kind: finding.severity for finding in judge(trace)}


def test_deep_post_norm_is_found_untrainable() -> None:
    found = kinds(predict(BROKEN))
    assert found["rank_collapse"] == "untrainable"
    assert found["update_amplification"] == "untrainable"


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_ordinary_models_are_found_trainable(name: str) -> None:
    assert verdict_of(judge(predict(PRESETS[name]))) == "trainable"


def test_depth_sets_in_where_the_threshold_is_crossed() -> None:
    trace = predict(BROKEN)
    finding = next(finding for finding in judge(trace) if finding.kind == "rank_collapse")
    assert finding.depth is not None
    limit = THRESHOLDS.distinct_untrainable
    stream = {tap.layer: 1.0 - tap.forward.correlation for tap in trace.stream("decoder") if tap.part == "attention"}
    assert stream[finding.depth - 1] > limit
    assert stream[finding.depth + 1] < limit


def test_saturation_is_found_and_qk_norm_advised() -> None:
    """Scores of a large deviation, by weights that are not the initialisation's."""
    config = dataclasses.replace(BROKEN, layers=3, norm_placement="pre")
    model = build_model(config, 0)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.query.weight.mul_(60.0)
    report = inspect(model, torch.randint(0, 257, (4, 32)))
    found = {finding.kind: finding for finding in report.findings}
    assert found["attention_saturation"].source == "both"
    assert any(advice.overrides == {"qk_norm": True} for advice in report.advice)


def test_not_finite_hides_nothing_of_the_other_stack() -> None:
    config = dataclasses.replace(BROKEN, architecture="seq2seq", decoder_layers=2)
    trace = predict(config)
    broken = dataclasses.replace(
        trace,
        taps=tuple(
            dataclasses.replace(tap, forward=Moments(0.0, float("nan"), 0.0)) if tap.stack == "decoder" else tap
            for tap in trace.taps
        ),
    )
    found = {(finding.stack, finding.kind) for finding in judge(broken)}
    assert ("decoder", "not_finite") in found
    assert ("encoder", "update_amplification") in found


def test_every_kind_has_words() -> None:
    report = inspect(BROKEN)
    assert {finding.kind for finding in report.findings} <= set(KINDS)
    for finding in report.findings:
        assert finding.evidence.endswith(".")


def test_advice_is_what_the_theory_confirms() -> None:
    report = inspect(BROKEN)
    assert report.verdict == "untrainable"
    assert report.advice[0].verdict == "trainable"
    for advice in report.advice:
        assert advice.cures
        after = judge(advice.predicted)
        assert not {finding.kind for finding in after if finding.severity != "note"} & set(advice.cures)


def test_the_advised_line_does_what_was_predicted() -> None:
    report = inspect(BROKEN)
    advice = next(advice for advice in report.advice if "init_(" in advice.line)
    model = build_model(BROKEN, 0)
    init_(model, advice.overrides["init"])
    after = predict(model, tokens=32)
    for tap in advice.predicted.stream("decoder")[1:]:
        assert after[tap.name].forward.variance == pytest.approx(tap.forward.variance, rel=0.25)
    assert verdict_of(judge(after)) == "trainable"


def test_a_model_is_left_as_it_was() -> None:
    model = build_model(dataclasses.replace(BROKEN, layers=4), 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inspect(model, torch.randint(0, 257, (2, 32)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config.init == "xavier"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_initialisation_is_advised_for_trained_weights() -> None:
    """Weights that work together, here all of one sign, are not what the theory of random ones describes."""
    model = build_model(dataclasses.replace(BROKEN, norm_placement="pre"), 0)
    with torch.no_grad():
        for block in model.blocks:
            block.feed_forward.up.weight.abs_()
            block.feed_forward.down.weight.abs_()
            block.feed_forward.down.weight[::2] *= -1.0
    report = inspect(model, torch.randint(0, 257, (2, 32)))
    assert "off_theory" in {finding.kind for finding in report.findings}
    assert report.verdict == "no forecast"
    assert {finding.severity for finding in report.findings} == {"note"}
    assert not report.advice
    assert any("no initialisation is advised" in note for note in report.predicted.notes)


def test_a_model_that_predicts_better_than_frequencies_is_called_trained() -> None:
    """A deep Post-LN stack whose last layers and head know a cycle of tokens: broken by theory, and it works."""
    config = dataclasses.replace(BROKEN, layers=1, position="none", tie_embeddings=False, vocab_size=32)
    model, ids = build_model(config, 0), (torch.arange(128) % 32).reshape(4, 32)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    start = inspect(model, ids)
    assert start.verdict == "trainable"
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    with torch.no_grad():  # a fault by its threshold that leaves the answers as they are
        model.blocks[0].attention.query.weight.mul_(100.0)
    report = inspect(model, ids)
    assert report.facts["loss"] < report.facts["frequency_loss"] == pytest.approx(math.log(32))
    assert report.verdict == "trained"
    assert {finding.severity for finding in report.findings} == {"note"}
    assert not report.advice
    assert "works" in words.verdict_sentence(report)
    assert all("(a fault" not in finding.evidence for finding in report.findings)


def test_observations_have_words() -> None:
    """Every kind but what is not finite, which stays a fault whatever the weights are."""
    assert set(words.OBSERVED) == set(KINDS) - {"not_finite"}
    found = Finding("not_finite", "untrainable", "decoder", 0, "measured", math.nan, math.nan, "x.")
    assert observations([found]) == (found,)


def test_what_a_sum_takes_away_is_no_share_of_zero() -> None:
    model = build_model(dataclasses.replace(BROKEN, layers=2, norm_placement="pre"), 0)
    with torch.no_grad():  # the second feed-forward answers the first one's negative
        one, two = (block.feed_forward for block in model.blocks)
        one.down.weight.mul_(30.0)
        two.up.weight.copy_(one.up.weight)
        two.down.weight.copy_(-one.down.weight)
    report = inspect(model, torch.randint(0, 257, (2, 32)))
    shares = [tap.share for tap in report.measured.at("branch")]
    assert all(0.0 < share <= 1.0 for share in shares)


def test_measured_and_predicted_findings_are_one() -> None:
    report = inspect(build_model(BROKEN, 0), torch.randint(0, 257, (4, 32)))
    pairs = [(finding.kind, finding.stack) for finding in report.findings]
    assert len(pairs) == len(set(pairs))
    assert next(f for f in report.findings if f.kind == "rank_collapse").source == "both"


def test_output_gradient_scales_the_prediction() -> None:
    unit = predict(BROKEN)
    tenth = predict(BROKEN, output_gradient=GradientMoments(0.1, 0.0))
    for tap in unit.stream("decoder"):
        assert tenth[tap.name].backward.variance == pytest.approx(0.1 * tap.backward.variance)


# ---- the command ----


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["inspect", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_writes_a_report_and_the_repair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("So long as men can breathe, or eyes can see, so long lives this. " * 200)
    repaired = tmp_path / "repaired.json"
    code, out, err = run(
        capsys, "--model", "deep-post-ln", "--set", "layers=26", "width=32", "--context", "32", "--data", str(text),
        "--apply", str(repaired), "--out", str(tmp_path / "report"),
    )  # fmt: skip
    assert code == 0, err
    assert "Not expected to train" in out
    assert (tmp_path / "report" / "report.html").exists()
    config = ModelConfig.from_dict(json.loads(repaired.read_text()))
    assert verdict_of(judge(predict(config))) == "trainable"
    code, out, err = run(capsys, "--model", str(repaired), "--theory", "--out", str(tmp_path / "after"))
    assert code == 0, err
    assert "untrainable" not in out


def test_the_compare_command_parses(tmp_path: Path) -> None:
    import shlex

    from clearhead._inspect_command import compare_command
    from clearhead.compare.plan import ComparePlan

    words = shlex.split(compare_command(BROKEN, {"init": "deepscale"}, "shakespeare"))
    assert words[:4] == ["clearhead", "compare", "--preset", "quick"]
    middle, arms = words.index("--set"), words.index("--arm")
    plan = ComparePlan.build(preset="quick", overrides=words[middle + 1 : arms], arms=words[arms + 1 :])
    before, after = (arm.apply(plan.base).model for arm in plan.arms)
    assert before == dataclasses.replace(BROKEN, vocab_size=before.vocab_size, context=before.context)
    assert after == dataclasses.replace(before, init="deepscale")


def test_a_large_model_is_compared_in_few_steps() -> None:
    import shlex

    from clearhead._inspect_command import compare_command
    from clearhead.compare.plan import ComparePlan

    parts = shlex.split(compare_command(PRESETS["deep-post-ln"], {"init": "deepscale"}, "shakespeare"))
    middle, arms = parts.index("--set"), parts.index("--arm")
    steps = int(parts[parts.index("--steps") + 1])
    plan = ComparePlan.build(preset="quick", steps=steps, overrides=parts[middle + 1 : arms], arms=parts[arms + 1 :])
    before, after = (arm.apply(plan.base) for arm in plan.arms)
    assert before.model.layers == 48
    assert (before.model.init, after.model.init) == ("xavier", "deepscale")
    assert before.total_steps == 200
    assert before.model.context == before.data.context == 32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "nonesuch"), "nonesuch"),
        (("--model", "small", "--set", "lyers=3"), "layers"),
        (("--model", "small", "--set", "layers=many"), "layers"),
        (("--model", "small", "--context", "1"), "two tokens"),
        (("--model", "small", "--data", "no-such.txt"), "no-such.txt"),
        (("--model", "small", "--theory", "--apply", "x.json"), "no advice"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "x.json").exists()


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(UserError, match="attention"):
        inspect(torch.nn.Linear(3, 3), torch.zeros(2, 4, 3))
