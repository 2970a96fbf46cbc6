"""experiments/laser: the gradient law on both sides of its crossover, controls that are what they say, tables."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing.dummy
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from experiments.laser import figure, look, prefix_max, saturation, text, text_page, two_tokens
from experiments.laser import run as laser_run

from clearhead.attention import attend as attend_file
from clearhead.attention import spec as spec_file
from clearhead.attention.attend import attend
from clearhead.attention.backends import BACKENDS
from clearhead.attention.mask import Mask
from clearhead.attention.observe import watching
from clearhead.attention.plugins import VARIABLE
from clearhead.compare.plan import TUNING_SEED
from clearhead.models.make import build_model

# ---- (b) two tokens ----


@pytest.mark.parametrize("distance", [0.3, 1.0, 4.0, 8.0])
def test_the_ratio_is_the_formula_and_turns_at_the_crossover(distance):
    border = two_tokens.crossover(distance)
    a = [1e-5, 0.5 * border, border, 0.5 * (1 + border), 0.999]
    for backend in two_tokens.BACKENDS:
        found = two_tokens.measured_ratio(a, distance, backend=backend)
        assert found == pytest.approx([two_tokens.ratio(one, distance) for one in a], rel=1e-9)
        assert found[1] > 1 > found[3]
        assert found[2] == pytest.approx(1.0, rel=1e-9)


def test_for_a_smaller_value_the_tokens_change_places():
    a = [0.1, 0.4, 0.9]
    found = two_tokens.measured_ratio(a, -3.0)
    assert found == pytest.approx([two_tokens.ratio(1 - one, 3.0) for one in a], rel=1e-9)


def test_the_gradient_of_many_scores_is_posterior_less_weight():
    generator = torch.Generator().manual_seed(0)
    scores, values = (2 * torch.randn(3, 11, dtype=torch.float64, generator=generator) for _ in range(2))
    weights = scores.softmax(dim=1)
    posterior = (scores + values).softmax(dim=1)
    mean = (weights * values).sum(dim=1, keepdim=True)
    torch.testing.assert_close(two_tokens.score_gradients("laser", scores, values), posterior - weights)
    torch.testing.assert_close(two_tokens.score_gradients("softmax", scores, values), weights * (values - mean))


# ---- (c) saturation ----


def test_what_is_not_reached_is_said_and_only_laser_reads_the_size_of_the_values():
    runs = [saturation.rescue(job) for job in saturation.jobs(quick=True)]
    by_key = {(run["method"], run["optimizer"]): run for run in runs}
    plain, laser = by_key["softmax", "descent"], by_key["LASER", "descent"]
    for gap in saturation.GAPS:
        assert len({saturation.steps_of(plain, gap, value, 1.0) for value in saturation.VALUES}) == 1
    assert saturation.steps_of(plain, 6.0, 8.0, 1.0) is None
    assert saturation.steps_of(laser, 6.0, 8.0, 1.0) < saturation.steps_of(laser, 6.0, 4.0, 1.0) < 60
    page = "\n".join(saturation.page(runs))
    assert "| softmax | 35 | 35 | 35 | not |" in page
    assert "Saturation: not finished." in saturation.page(runs[:-1])


def test_a_rescue_follows_the_gradient_of_the_stated_loss():
    """One step of descent on (O / v - 1/2)^2, by hand, for softmax."""
    scores = torch.zeros(1, saturation.KEYS, dtype=torch.float64)
    scores[0, 1] = 2.0
    weights = scores.softmax(dim=1)
    error = weights[0, 0] - 0.5
    delta = torch.zeros_like(weights)
    delta[0, 0] = 1.0
    after = (scores - 2 * error * weights[0, 0] * (delta - weights)).softmax(dim=1)[0, 0]
    asked = scores.clone().requires_grad_()
    loss = (saturation.output("softmax", asked, torch.tensor([4.0], dtype=torch.float64)) / 4.0 - 0.5).square().sum()
    (gradient,) = torch.autograd.grad(loss, asked)
    assert float((scores - gradient).softmax(dim=1)[0, 0]) == pytest.approx(float(after), rel=1e-12)


# ---- (a) prefix maximum ----


def test_arms_of_a_seed_begin_alike_and_read_the_same_streams():
    layers = {name: prefix_max.Layer(arm, 3) for name, arm in prefix_max.ARMS.items()}
    x_btd = torch.randn(2, 5, prefix_max.CHANNELS)
    for layer in layers.values():
        for name, parameter in layers["softmax"].named_parameters():
            assert torch.equal(parameter, layer.get_parameter(name))
    learned = layers["softmax, learned temperature"](x_btd)
    torch.testing.assert_close(learned, layers["softmax"](x_btd))
    four, one = layers["softmax, values x 4"], layers["softmax"]
    bias = one.output.bias
    torch.testing.assert_close(four(x_btd) - bias, 4 * (one(x_btd) - bias))  # a mean is linear in the values
    assert (layers["LASER, values x 4"](x_btd) - layers["LASER"](x_btd)).abs().max() > 1e-3
    later = x_btd.clone()
    later[:, -1] += 1.0
    for layer in layers.values():
        torch.testing.assert_close(layer(later)[:, :-1], layer(x_btd)[:, :-1])


def run_of(arm, rate, seed, error):
    lengths = None if error is None else {str(tokens): error for tokens in prefix_max.LENGTHS}
    return {
        "arm": arm, "rate": rate, "seed": seed, "steps": 9, "error": error, "by_length": lengths,
        "value_spread": 1.0, "temperature": None, "cpu_seconds": 0.5,
    }  # fmt: skip


def test_rates_are_chosen_on_tuning_seeds_alone_and_never_one_that_diverged():
    runs = [run_of("softmax", rate, TUNING_SEED, error) for rate, error in ((0.01, 0.4), (0.1, 0.3), (1.0, None))]
    runs += [run_of("softmax", 0.01, seed, 0.0) for seed in range(3)]
    assert prefix_max.chosen_rates(runs) == {"softmax": 0.1}
    assert {job.rate for job in prefix_max.final_jobs(runs, 3)} == {0.1}
    assert all(job.seed < TUNING_SEED for job in prefix_max.final_jobs(runs, 3))
    keys = [job.key for job in prefix_max.tuning_jobs()]
    assert len(set(keys)) == len(keys) == len(prefix_max.ARMS) * len(prefix_max.RATES) * prefix_max.TUNING_SEEDS


def test_a_diverged_arm_stands_in_the_table_and_is_not_called_better():
    runs = [run_of(arm, 0.1, TUNING_SEED, 0.3) for arm in ("softmax", "LASER", "LASER, 8 heads")]
    runs += [run_of("softmax", 0.1, seed, 0.3 + 0.001 * seed) for seed in range(4)]
    runs += [run_of("LASER", 0.1, seed, None if seed == 2 else 0.01 + 0.002 * seed) for seed in range(4)]
    runs += [run_of("LASER, 8 heads", 0.1, seed, None) for seed in range(4)]
    rows = prefix_max.summary(runs)
    by_arm = {row["arm"]: row for row in rows}
    assert (by_arm["LASER"]["finished"], by_arm["LASER"]["verdict"]) == (3, "not judged")
    assert by_arm["LASER, 8 heads"]["verdict"] == "diverged"
    page = "\n".join(prefix_max.page(rows))
    assert "| LASER, 8 heads | 0.1 (edge) | 0 of 4 | diverged |" in page
    assert "1 of the 4 runs of LASER diverged (seed 2)." in page
    assert figure.figures([], [], rows, None)["prefix_max.svg"].count("<path") > 4


def test_a_hopeless_rate_diverges_and_says_so():
    found = prefix_max.train_one(prefix_max.Job("LASER, values x 4", 1e30, 0, steps=4))
    assert found["error"] is None
    assert found["by_length"] is None


# ---- (d) text ----


@pytest.fixture
def plugin(monkeypatch):
    """The two scaled reads, known for the time of a test."""
    monkeypatch.setenv(VARIABLE, "")
    known, backends, modules = dict(spec_file.REGISTRY), dict(BACKENDS), set(sys.modules)
    text.use_plugin()
    yield
    for table, before in ((spec_file.REGISTRY, known), (BACKENDS, backends)):
        table.clear()
        table.update(before)
    for name in set(sys.modules) - modules:
        if name.startswith("clearhead_plugin_scaled_values"):
            del sys.modules[name]
    spec_file._parse.cache_clear()
    attend_file._PARSED.clear()


def test_the_scaled_reads_are_reads_of_scaled_values(plugin):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 2, 7, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    for scaled, plain in (("scaled_laser:3.0", "laser"), ("scaled_mean:3.0", "softmax")):
        v.requires_grad_()
        found = attend(q, k, v, scaled, mask=Mask.causal()).out
        wanted = attend(q, k, 3.0 * v, plain, mask=Mask.causal()).out
        torch.testing.assert_close(found, wanted)
        (got,) = torch.autograd.grad(found.square().sum(), v)
        (want,) = torch.autograd.grad(wanted.square().sum(), v)
        torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="dropout"):
        attend(q, k, v, "scaled_laser:3.0", dropout_p=0.1)
    with pytest.raises(ValueError, match="sum to 1"):
        spec_file.AttentionSpec.parse("self_adjust+scaled_laser:2.0")


def test_arms_differ_in_the_attention_alone_and_get_the_same_grid(plugin):
    plan = text.plan(seeds=5, workers=1)
    base = plan.base.own_model
    assert len(plan.arms) == 6
    assert len(plan.seeds) == 5
    assert plan.learning_rates == text.RATES
    assert plan.tuning_seeds == 2
    for arm in plan.arms:
        changed = arm.apply(plan.base).own_model
        assert dataclasses.replace(changed, attention=base.attention) == base
        assert build_model(changed, 0).count_parameters()["total"] < 500_000
    named = {arm.name for arm in plan.arms}
    assert all(name in named and against in named for name, against in text.PAIRS)


def test_the_plugin_is_named_once_beside_others(plugin, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(text.PLUGIN))
    text.use_plugin()
    assert os.environ[VARIABLE] == str(text.PLUGIN)


def test_a_look_measures_what_the_spec_reads(plugin):
    """Equal scores: weights 1/n each, so the share of starved ones is known, and the offset is log-mean-exp - mean."""
    n, found = 1200, {}
    q, k = torch.zeros(1, 1, n, 2), torch.zeros(1, 1, n, 2)
    v = torch.randn(1, 1, n, 3, generator=torch.Generator().manual_seed(2))
    for spec in ("laser", "scaled_mean:2.0"):
        seen = []
        with watching(lambda call, seen=seen: seen.append(look.of_call(call))):
            attend(q, k, v, spec)
        (found[spec],) = seen
    spread = v.std(dim=2).mean()
    offset = (torch.logsumexp(v, dim=2) - torch.tensor(float(n)).log() - v.mean(dim=2)).mean()
    assert found["laser"]["spread"] == pytest.approx(float(spread), rel=1e-5)
    assert found["scaled_mean:2.0"]["spread"] == pytest.approx(2 * float(spread), rel=1e-5)
    assert found["laser"]["offset"] == pytest.approx(float(offset), rel=1e-3)
    assert found["scaled_mean:2.0"]["offset"] > 3 * float(offset)  # about var / 2
    assert (found["laser"]["starved"], found["laser"]["dead"]) == (1.0, 0.0)


def test_softmax_and_laser_of_a_seed_start_from_the_same_weights(plugin):
    plan = text.plan(seeds=2, workers=1, quick=True)
    configs = [arm.apply(plan.base).own_model for arm in plan.arms]
    first, *others = [dict(build_model(config, 7).named_parameters()) for config in configs]
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    looked = look.look(build_model(configs[1], 7), tokens, tokens)
    assert looked["query_gradient"] > 0
    assert looked["spread"] > 0


def arm_of(name, tests, bits, seconds=1.0):
    return {
        "name": name, "tests": {str(i): value for i, value in enumerate(tests)}, "bits": bits, "tokens": [10, 20, 40],
        "speed": {"median_seconds": seconds, "ratio": seconds}, "parameters": 7, "rate": 0.003,
        "tuning": {"at_edge": name == "laser"}, "gradient": None, "looks": {},
        "comparison": {"mean": None, "interval": None, "sentence": f"{name}."},
    }  # fmt: skip


def test_pairs_say_better_worse_not_shown_and_not_judged():
    falls = [[3, 2, 1], [3, 2, 1], [3, 2, 1]]
    arms = [
        arm_of("softmax", [2.0, 2.1, 2.2], falls),
        arm_of("laser", [1.9, 2.001, 2.099], [[3, 1, 1], [3, 1, 1], [3, 2, 2]], 2.0),
        arm_of("softmax+learned", [2.0, 2.1, 2.2], falls),
        arm_of("laser+learned", [None, None, None], []),
        arm_of("softmax, values x 4", [2.0, 2.1, 2.2], falls),
        arm_of("laser, values x 4", [1.9, None, 2.099], falls[:2]),
    ]
    found = {"arms": arms, "pairs": text.pairs(arms)}
    better, gone, short = text_page.judge(found)
    assert "*better*, -0.1000" in better
    # Two of three seeds get to 1 bit, after 20 of the other's 40 tokens, at twice the time a token.
    assert "reached in 2 of 3 seeds, after 0.50 of its tokens and 1.00 of its time" in better
    assert "there is no seed at which both finished. 3 runs of laser+learned did not finish." in gone
    assert "*better*" not in short
    assert "1 runs of laser, values x 4 did not finish" in short
    page = "\n".join(text_page.page(found))
    assert "| laser+learned | 7 | 0.003 | 0 of 3 | diverged |" in page
    assert "0.003 (edge)" in page
    assert "text.svg" in figure.figures([], [], [], found)


# ---- the command ----


def test_it_goes_on_where_it_stopped_and_leaves_the_published_results_alone(tmp_path, monkeypatch, capsys):
    done = [two_tokens.measure(job) for job in two_tokens.jobs(quick=True)]
    lines = [json.dumps({**one, "mark": place}) for place, one in enumerate(done)]
    (tmp_path / "two_tokens.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    readme = (laser_run.HERE / "README.md").read_text()
    command = ["run", "--quick", "--parts", "two_tokens", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    # Threads instead of processes of its own, which would import torch anew.
    threads = SimpleNamespace(get_context=lambda kind: multiprocessing.dummy)
    monkeypatch.setattr("experiments.running.multiprocessing", threads)
    laser_run.main()
    kept = (tmp_path / "two_tokens.jsonl").read_text().splitlines()
    assert kept[:-1] == lines[:-1]
    assert json.loads(kept[-1])["value"] == done[-1]["value"]
    assert "holds" in capsys.readouterr().out
    assert (laser_run.HERE / "README.md").read_text() == readme
    assert json.loads((tmp_path / "results.json").read_text())["text"] is None
