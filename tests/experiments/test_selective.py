"""experiments/selective: theory equals measurement, tasks have their stated solutions, rates are chosen apart from the
verdict, a claim is judged by its interval, and the page says what the runs say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from multiprocessing.pool import ThreadPool

import pytest
import torch
from experiments.selective import (
    claims,
    denoising,
    dilution,
    parameters,
    passkey,
    report,
    spikiness,
    text,
    theory,
    token_generation,
    tuned,
)
from experiments.selective.arms import ARMS, BASELINE, CONTROL, FIVE, WHOLE
from experiments.selective.judge import CONFIRMED, REFUTED, UNTOLD, Claim, judge
from experiments.selective.layer import OneLayer
from experiments.selective.tuned import Job, Plan

from clearhead.compare.plan import TUNING_SEED
from clearhead.data.synthetic.task import IGNORE
from clearhead.layers.temperature import SelectiveTemperatures
from clearhead.models.make import build_model


@pytest.mark.parametrize("n", [2, 17, 400])
@pytest.mark.parametrize("slope", theory.SLOPES)
def test_dilution_by_formula_is_dilution_as_measured(n, slope):
    tau = float(theory.temperature(n, slope))
    assert tau == pytest.approx(1 + slope * math.log(n))
    needle = theory.measured(theory.needle_scores(n), slope)
    assert needle["max_weight"] == pytest.approx(theory.needle_weight(n, theory.SCORE, tau), rel=1e-9)
    assert needle["entropy"] == pytest.approx(theory.needle_entropy(n, theory.SCORE, tau), rel=1e-6)
    bound = theory.needle_weight(n, 2 * theory.NORM, tau)
    assert theory.measured(theory.extreme_scores(n), slope)["max_weight"] == pytest.approx(bound, rel=1e-9)
    tokens = theory.token_scores(n, torch.Generator().manual_seed(1))
    assert theory.measured(tokens, slope)["max_weight"] < bound


def test_the_bound_asks_for_a_norm_of_half_the_logarithm():
    for n in (8, 1000):
        assert theory.needle_weight(n, 2 * theory.needed_norm(n), 1.0) == pytest.approx(0.5)


def test_the_entropy_of_noise_is_the_limits_formula_where_it_is_far_from_frozen():
    scores = torch.randn(8, 16384, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for slope in (0.0, 0.1):
        tau = float(theory.temperature(16384, slope))
        assert tau < 0.5 * math.sqrt(2 * math.log(16384))
        assert theory.measured(scores, slope)["entropy"] == pytest.approx(theory.noise_entropy(16384, tau), abs=0.03)


def test_a_sharp_reader_finds_every_key_and_the_layer_can_be_one():
    source, query, value, place = dilution.draw(64, 200, torch.Generator().manual_seed(0))
    assert torch.equal(dilution.solve(source, query), value)
    layer = OneLayer(dilution.KEY + dilution.VALUES, dilution.KEY, dict(ARMS[BASELINE]), seed=0)
    with torch.no_grad():  # keys are read at full length, values are written where the logits are read
        for matrix in (layer.attention.query, layer.attention.key):
            matrix.weight.zero_()[:, : dilution.KEY] = 40.0 * torch.eye(dilution.KEY)
        layer.attention.value.weight.zero_()[: dilution.VALUES, dilution.KEY :] = torch.eye(dilution.VALUES)
        layer.attention.output.weight.zero_()[dilution.KEY :, : dilution.VALUES] = torch.eye(dilution.VALUES)
    out, seen = layer.looked(source, query)
    assert torch.equal(dilution.logits(out).argmax(-1), value)
    assert seen["weights"][torch.arange(64), place].min() > 0.95
    assert layer.norm() == pytest.approx(1600.0)


def test_temperatures_of_the_layer_count_keys_for_queries_and_places_for_values():
    layer = OneLayer(8, 8, dict(ARMS["selective, no token part"]), seed=0)
    temperatures = layer.attention.temperatures
    assert isinstance(temperatures, SelectiveTemperatures)
    with torch.no_grad():
        layer.attention.query.weight.zero_()  # flat attention: the output shows the values' temperatures
        layer.attention.value.weight.copy_(torch.eye(8))
        layer.attention.output.weight.copy_(torch.eye(8))
    out = layer(torch.ones(1, 10, 8), torch.ones(1, 1, 8))
    slope = layer.slopes()["value"]
    wanted = sum(1 + slope * math.log(n) for n in range(1, 11)) / 10
    assert out.detach().mean() == pytest.approx(wanted, rel=1e-5)


def test_the_graph_has_the_stated_neighbours_and_a_solution():
    assert sorted(token_generation.neighbours()) == [1, 1, 2, 2, 2, 2, 2, 4]
    wanted = token_generation.wanted()
    perfect = token_generation.measure(token_generation.solution(), wanted)
    assert perfect["excess"] == pytest.approx(0.0, abs=1e-6)
    assert perfect["l1"] == pytest.approx(0.0, abs=1e-5)
    flat = token_generation.measure(torch.full((8, 8), -math.log(8)), wanted)
    assert flat["excess"] == pytest.approx(math.log(8) - token_generation.entropy(wanted), abs=1e-6)


def test_all_maps_of_a_seed_start_alike():
    maps = [token_generation.Map(arm, "3, learned", seed=4)() for arm in token_generation.ARMS]
    for other in maps[1:]:
        torch.testing.assert_close(other, maps[0])


@pytest.mark.parametrize("sigma", [0.1, 0.3])
def test_estimators_cost_what_their_formulas_say_and_bayes_costs_least(sigma):
    found = denoising.untrained(sigma)
    for name in ("all tokens", "true signals"):
        assert found[name] == pytest.approx(found[f"{name}, formula"], rel=0.03)
    assert found["posterior"] < found["true signals"] < found["selected tokens"] < found["all tokens"]


def test_selecting_is_as_good_as_knowing_where_noise_is_weak():
    found = denoising.untrained(0.1)
    assert found["selected tokens"] == pytest.approx(found["true signals"], rel=0.01)


def test_the_last_token_is_always_signal():
    x, wanted, signal = denoising.draw(500, 12, 0.0, torch.Generator().manual_seed(0))
    assert bool(signal[:, -1].all())
    assert float(signal[:, :-1].float().mean()) == pytest.approx(denoising.SIGNAL, abs=0.03)
    torch.testing.assert_close(x[:, -1], wanted)
    torch.testing.assert_close(denoising.posterior(x, 0.01), wanted)


@pytest.mark.parametrize("setting", list(passkey.SETTINGS))
def test_a_hand_made_reader_solves_the_passkey_at_every_length(setting):
    source = passkey.data(setting)
    first_value = source.task.words + source.task.keys
    for length in passkey.LENGTHS:
        rows = source.rows("test", range(4), length)
        for tokens, targets in zip(rows.tokens, rows.targets, strict=True):
            for place in (targets != IGNORE).nonzero()[0]:
                if setting == "keys":
                    said = tokens[list(tokens[: place - 1]).index(tokens[place]) + 1]
                else:
                    said = next(token for token in tokens if token >= first_value)
                assert said == targets[place]


def test_arms_of_the_passkey_differ_in_temperatures_alone():
    for setting in passkey.SETTINGS:
        plain = dict(build_model(passkey.config(BASELINE, setting), seed=3).named_parameters())
        for arm in FIVE[1:]:
            own = dict(build_model(passkey.config(arm, setting), seed=3).named_parameters())
            assert all(torch.equal(own[name], parameter) for name, parameter in plain.items())
            assert all("temperatures" in name for name in own.keys() - plain.keys())
            assert own.keys() > plain.keys()


@pytest.mark.parametrize("granularity", parameters.GRANULARITIES)
def test_parameters_counted_are_parameters_by_arithmetic(granularity):
    for name in ("tiny", "base", "the passkey's with keys"):
        config = parameters.MODELS[name]
        counted = parameters.count(config, "softmax+selective", granularity)
        plain = parameters.count(config, "softmax", granularity)
        assert counted["total"] - plain["total"] == counted["temperature"] == parameters.expected(config, granularity)


def test_spikiness_has_its_bounds_and_norms_are_those_of_the_heads():
    one_hot, flat = torch.eye(5)[:1], torch.full((1, 5), 0.2)
    five = torch.tensor([5.0])
    assert spikiness.spikiness(one_hot, five) == pytest.approx(0.2)
    assert spikiness.spikiness(flat, five) == pytest.approx(1.0)
    model = build_model(passkey.config(BASELINE, "keys"), seed=1)
    layer = model.blocks[0].attention
    first_head = layer.query.weight[: layer.head_dim].T @ layer.key.weight[: layer.head_dim]
    found = spikiness.norms(model)
    assert len(found) == 2 * 4
    assert found[0] == pytest.approx(float(torch.linalg.matrix_norm(first_head.detach(), ord=2)), rel=1e-5)
    with torch.no_grad():  # without scores every map is flat
        for block in model.blocks:
            block.attention.query.weight.zero_()
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    maps = spikiness.of_model(build_flat(model), tokens)
    assert maps["spikiness"] == pytest.approx(1.0, abs=1e-6)
    assert maps["entropy_share"] == pytest.approx(1.0, abs=1e-6)
    assert maps["norm"] == 0.0


def build_flat(model):
    """The same weights without ALiBi, which is not flat."""
    flat = build_model(replace(model.config, position="none"), seed=1)
    flat.load_state_dict(model.state_dict())
    return flat


# ---- rates, resuming, verdicts, the page ----


def fake_train(job: Job):
    """A run whose best rate is 2, but for the verdict's seeds, which must not be asked."""
    if job.arm == "bad" and job.rate == 3.0:
        return job.record("diverged", val=None)
    return job.record("finished", val=abs(job.rate - 2.0) + 0.001 * job.seed, error=1.0 + job.seed)


PLAN = Plan(("good", "bad"), (1.0, 2.0, 3.0), steps=7, seeds=3, settings=("x", "y"), tuned_at="x")


class InThreads:
    """A pool without processes: starting one costs seconds, and what is tested is which runs are asked for."""

    def get_context(self, _):
        return self

    def Pool(self, workers):
        return ThreadPool(workers)


def test_rates_are_chosen_on_seeds_that_the_verdict_never_sees(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.running.multiprocessing", InThreads())
    path = tmp_path / "runs.jsonl"
    found = tuned.run_plan(PLAN, path, fake_train, workers=1)
    assert {one["rate"] for one in found["rates"]} == {2.0}
    runs = tuned.read_runs(path)
    assert len(runs) == 2 * 3 * 2 + 2 * 2 * 3
    assert {run["seed"] for run in found["runs"]} == {0, 1, 2}
    assert {run["seed"] for run in runs if run not in found["runs"]} == {TUNING_SEED, TUNING_SEED + 1}

    # Stopped in the middle and begun again: only what is missing is run, and the outcome is the same.
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:15]) + "\n")
    again = tuned.run_plan(PLAN, path, fake_train, workers=1)
    assert again["rates"] == found["rates"]
    assert path.read_text().splitlines()[:15] == lines[:15]
    assert sorted(path.read_text().splitlines()) == sorted(lines)


def test_a_rate_that_diverged_once_is_not_chosen():
    runs = [fake_train(job) for job in PLAN.tuning_jobs()]
    for run in runs:
        if run["rate"] == 2.0 and run["arm"] == "bad" and run["seed"] == TUNING_SEED:
            run["val"] = None
    chosen = PLAN.chosen(runs)
    assert chosen["good", "y"] == 2.0
    assert chosen["bad", "y"] == 1.0


def runs_of(arm, values, status="finished"):
    return [
        {"arm": arm, "setting": "", "seed": seed, "status": status, "error": value} for seed, value in enumerate(values)
    ]


def claim(**more):
    return Claim("less", WHOLE, BASELINE, "error", lambda run: run["error"], **more)


@pytest.mark.parametrize(
    ("own", "verdict"),
    [
        ((0.50, 0.61, 0.49, 0.58, 0.52), CONFIRMED),
        ((1.52, 1.61, 1.48, 1.55, 1.5), REFUTED),
        ((0.5, 1.6, 0.9, 1.2, 1.0), UNTOLD),
    ],
)
def test_a_claim_is_judged_by_its_interval(own, verdict):
    runs = [*runs_of(BASELINE, (1.0, 1.01, 0.99, 1.02, 1.0)), *runs_of(WHOLE, own)]
    judged = judge([claim()], runs)[0]
    assert judged["verdict"] == verdict
    assert judged["about"]["arm"] == WHOLE
    assert ("80 % power" in judged["why"]) == (verdict == UNTOLD)
    json.dumps(judged)


def test_a_margin_is_part_of_the_claim_and_a_diverged_run_confirms_nothing():
    runs = [*runs_of(BASELINE, (1.0, 1.01, 0.99)), *runs_of(WHOLE, (0.8, 0.82, 0.78))]
    assert judge([claim()], runs)[0]["verdict"] == CONFIRMED
    assert judge([claim(margin=0.1)], runs)[0]["verdict"] == CONFIRMED
    assert judge([claim(margin=0.5)], runs)[0]["verdict"] == REFUTED
    assert judge([claim()], [*runs, *runs_of(WHOLE, (math.nan,), "diverged")])[0]["verdict"] == UNTOLD
    assert judge([claim()], runs_of(BASELINE, (1.0, 2.0)))[0]["verdict"] == UNTOLD
    # The more claims, the wider each interval.
    one, two = judge([claim()], runs)[0]["interval"], judge([claim(), claim()], runs)[0]["interval"]
    assert two[0] < one[0] < one[1] < two[1]


def test_the_claims_of_the_arithmetic_follow_from_its_table(monkeypatch):
    monkeypatch.setattr(theory, "LENGTHS", (16, 1024))
    rows = theory.table()
    assert [one["verdict"] for one in claims.of_theory(rows)] == [CONFIRMED] * 3
    for row in rows:
        if row["kind"] == "bound, random tokens":
            row["max_weight"] = 1.0
    assert claims.of_theory(rows)[0]["verdict"] == REFUTED
    assert len(report.of_theory(rows)) == 2 + 2 * len(theory.SLOPES) + 2


def dilution_run(arm, seed, target):
    at = {"accuracy": target, "target": target, "ln_target": math.log(target), "loss": 0.1, "entropy": 1.0}
    return {
        "arm": arm, "setting": "", "rate": 0.01, "seed": seed, "steps": 400, "status": "finished", "val": 0.1,
        "lengths": {str(n): at for n in dilution.LENGTHS}, "norm": 10.0 * target,
    }  # fmt: skip


def test_the_page_says_what_the_runs_say():
    level = dict.fromkeys(FIVE, 0.1) | {WHOLE: 0.6, CONTROL: 0.3}
    noise = [0.0, 0.001, -0.001]
    runs = [
        dilution_run(arm, seed, level[arm] + noise[(seed + place) % 3])
        for place, arm in enumerate(FIVE)
        for seed in (0, 1, 2)
    ]
    rates = [{"arm": arm, "setting": "", "rate": 0.01, "at_edge": arm == WHOLE} for arm in FIVE]
    found = {"runs": runs, "rates": rates, "grid": [0.003, 0.01]}
    judged = judge(claims.of_dilution(), runs)
    assert judged[0]["verdict"] == CONFIRMED
    assert judged[-1]["verdict"] == REFUTED  # the made-up norm grows with the target's weight
    page = report.page({"dilution": {"found": found, "claims": judged}})
    row = next(line for line in page if line.startswith(f"| {WHOLE} |"))
    assert "0.01*" in row
    assert "0.600 ± 0.002" in row
    counted = [sum(one["verdict"] == verdict for one in judged) for verdict in (CONFIRMED, REFUTED)]
    assert page[0].startswith(f"Of {len(judged)} claims: ")
    assert f"{counted[0]} {CONFIRMED}" in page[0]
    assert "Not run yet: theory, token_generation" in page[2]


def test_arms_of_the_text_are_the_arms_and_get_the_same_grid():
    plan = text.plan(seeds=5, workers=1)
    assert [arm.name for arm in plan.arms] == list(ARMS)
    assert plan.learning_rates == text.RATES
    assert plan.baseline == BASELINE
    models = [arm.apply(plan.base).model.to_dict() for arm in plan.arms]
    touched = {key for model in models for key, value in model.items() if value != models[0][key]}
    assert touched == {"attention", "temperature_parts", "temperature_on", "temperature_granularity"}
