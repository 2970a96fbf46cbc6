"""experiments/self_adjust: the Jacobians on paper, the controls' parts, the verdicts' rules, what is looked at."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import pytest
import torch
from experiments.self_adjust import jacobian, judge, report, saturation, text
from experiments.self_adjust.arms import (
    BASELINE,
    CONTROLS,
    DEFAULT,
    EXPLAINING,
    FORMS,
    GATE,
    ROW_SUM,
    SHAPE,
    SPECS,
    use_controls,
)

from clearhead.attention.attend import attend
from clearhead.attention.extras import measure
from clearhead.attention.mask import Mask
from clearhead.attention.observe import watching
from clearhead.attention.plugins import VARIABLE
from clearhead.attention.spec import AttentionSpec
from clearhead.errors import UserError
from clearhead.train.loop import train

KEEPS = ("row_sum", "shape", "gradient", "values")


@pytest.fixture(autouse=True, scope="module")
def controls() -> Iterator[None]:
    """The plug-in, and the environment put back."""
    before = os.environ.get(VARIABLE)
    use_controls()
    use_controls()
    assert os.environ[VARIABLE].split(os.pathsep).count(str(CONTROLS)) == 1
    yield
    if before is None:
        del os.environ[VARIABLE]
    else:
        os.environ[VARIABLE] = before


def scores(rows: int = 6, keys: int = 9) -> torch.Tensor:
    """Mixed signs, no ties."""
    return 2.0 * jacobian.rows(rows, keys, seed=3)


# ---- (a) ----


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("shift", [0.0, 20.0, -20.0])
def test_the_formula_of_the_jacobian_is_automatic_differentiation(name: str, shift: float) -> None:
    x = scores() + shift
    _, found = jacobian.jacobians(x, SPECS[name])
    assert (found - jacobian.formula(x, SPECS[name])).abs().max() <= 1e-12


@pytest.mark.parametrize("name", FORMS)
def test_what_lives_at_saturation_is_the_row_sum(name: str) -> None:
    """The shares are a function of the odds, and these carry the s of a token that is not the top."""
    found = jacobian.sizes(jacobian.ahead(16.0), FORMS[name])
    assert found["shares"] < jacobian.sizes(jacobian.ahead(16.0), "softmax")["norm"]
    if found["norm"] > jacobian.ALIVE:
        assert found["row_sum"] == pytest.approx(found["norm"], rel=1e-4)


def test_a_rescue_ends_where_the_weight_is_reached() -> None:
    steps = jacobian.rescue("softmax", 100)
    assert steps[0] is not None
    assert steps[0] < steps[1]
    assert steps[-1] is None


# ---- the controls ----


def weights(x: torch.Tensor, spec: str, backend: str = "auto") -> torch.Tensor:
    return jacobian.weights(x, spec) if backend == "auto" else _reference(x, spec)


def _reference(x: torch.Tensor, spec: str) -> torch.Tensor:
    from clearhead.attention.reference import DENSE_WEIGHTS

    choice = AttentionSpec.parse(spec).weights
    return DENSE_WEIGHTS[type(choice)](choice, x, torch.ones_like(x, dtype=torch.bool))


@pytest.mark.parametrize("form", ["range", "minmax", "min_shift"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_part_is_what_its_name_says(form: str, backend: str) -> None:
    x = scores()
    s, w = weights(x, "softmax", backend), weights(x, f"self_adjust:form={form}", backend)
    total = w.sum(-1, keepdim=True)
    row_sum, shape, gradient, values = (
        weights(x, f"self_adjust_part:keep={keep},form={form}", backend) for keep in KEEPS
    )
    torch.testing.assert_close(row_sum.sum(-1, keepdim=True), total)
    torch.testing.assert_close(row_sum / total, s)
    torch.testing.assert_close(shape.sum(-1), torch.ones(len(x), dtype=x.dtype))
    torch.testing.assert_close(shape, (w + 1e-3 * s) / (total + 1e-3))
    torch.testing.assert_close(gradient, s)
    torch.testing.assert_close(values, w)


def test_gradients_are_exchanged_and_nothing_else() -> None:
    x = scores()
    for keep, other in (("gradient", "self_adjust"), ("values", "softmax")):
        _, found = jacobian.jacobians(x, f"self_adjust_part:{keep}")
        torch.testing.assert_close(found, jacobian.jacobians(x, other)[1])


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("detached", ["true", "false"])
def test_the_tiles_of_a_part_equal_its_formula(keep: str, detached: str) -> None:
    """Output and every gradient, causal, with grouped queries and a row that sees one key."""
    torch.manual_seed(0)
    leaves = [torch.randn(2, h, 70, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    d_out = torch.randn(2, 4, 70, 8, dtype=torch.float64)
    spec = f"self_adjust_part:keep={keep},detach_extrema={detached}"
    found = []
    for backend in ("chunked", "reference"):
        out = attend(*leaves, spec, mask=Mask.causal(), backend=backend).out
        found.append([out, *torch.autograd.grad(out, leaves, d_out)])
    for fast, true in zip(*found, strict=True):
        assert (fast - true).norm() <= 1e-10 * true.norm()


@pytest.mark.parametrize("spec", ["row_sum", "shape", "keep=row_sum,form=product", "keep=shape,form=minmax"])
def test_the_first_two_parts_have_their_own_gradient(spec: str) -> None:
    """Numeric differences; of gradient and values they see another function's, which is what these are for."""
    torch.manual_seed(1)
    leaves = tuple(torch.randn(1, 1, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    spec = f"self_adjust_part:{spec}"
    assert torch.autograd.gradcheck(lambda *t: attend(*t, spec, mask=Mask.causal(), backend="chunked").out, leaves)


def test_a_row_of_zeros_has_the_shape_of_softmax() -> None:
    found = weights(torch.zeros(1, 5, dtype=torch.float64), "self_adjust_part:shape")
    torch.testing.assert_close(found, torch.full((1, 5), 0.2, dtype=torch.float64))


def test_meaningless_parts_are_refused() -> None:
    with pytest.raises(UserError, match="any sign"):
        AttentionSpec.parse("self_adjust_part:keep=shape,form=product")
    with pytest.raises(UserError, match="row_sum"):
        AttentionSpec.parse("self_adjust_part:row_sums")


# ---- (b) ----


def test_arms_differ_in_what_they_say_and_share_their_rates() -> None:
    plans = dict(text.plans(seeds=5, workers=1))
    for plan in plans.values():
        assert plan.learning_rates == text.RATES
        assert len(plan.seeds) == 5
        for one in plan.arms:
            assert set(one.overrides) <= {"model.attention", "model.output_gate"}
    assert [one.name for one in plans[text.FORMS_PLAN].arms] == [BASELINE, *FORMS, *EXPLAINING]
    sizes = {plan.base.model.position for plan in plans.values()}
    assert len(sizes) == len(plans)
    rates = dict.fromkeys(text.LONG_ARMS, 0.003)
    long = text.longer(rates | {DEFAULT: 0.006}, seeds=5, workers=1)
    short = plans[text.FORMS_PLAN].base
    assert long.base.total_steps == text.LONGER * short.total_steps
    assert long.arm(DEFAULT).overrides["optim.lr"] == 0.006
    for section in ("model", "data"):
        assert getattr(long.base, section) == getattr(short, section)


def one_arm(name: str, values: list[float], bits: list[float] | None = None) -> dict[str, object]:
    """An arm as `text.keep` leaves it."""
    seeds = [str(seed) for seed in range(len(values))]
    return {
        "name": name, "overrides": {}, "parameters": 1, "rate": 0.003, "at_edge": False, "grid": {},
        "status": dict.fromkeys(seeds, "finished"), "tests": dict(zip(seeds, values, strict=True)),
        "tokens": [100, 200], "bits": {seed: bits or [4.0, 3.0] for seed in seeds}, "gradient": [], "speed": None,
        "cpu_seconds": 1.0,
    }  # fmt: skip


def comparison(steps: int = 600, **means: float) -> dict[str, object]:
    """A comparison whose arms lie at known places, with a little spread that differs from arm to arm."""
    arms = []
    for index, (name, mean) in enumerate(means.items()):
        arms.append(one_arm(name, [mean + 0.001 * ((seed * (index + 2)) % 5) for seed in range(5)]))
    return {"steps": steps, "seeds": list(range(5)), "arms": arms, "sessions": []}


def test_a_control_carries_what_the_rule_says() -> None:
    found = {
        "forms": comparison(**{BASELINE: 3.0, DEFAULT: 2.8, ROW_SUM: 2.8, SHAPE: 2.9, GATE: 3.0}),
        "longer": comparison(2400, **{BASELINE: 2.5, DEFAULT: 2.5}),
    }
    told = {line.split(":")[0]: line for line in judge.explanations(found)}
    assert "carries the whole gain, as far as can be seen " in told["Row sum alone"]
    assert "carries a part of the gain " in told["Shape alone"]
    assert "carries nothing that is shown " in told["Output gate"]
    assert "no gain is shown any more" in judge.explanations(found)[-1]
    found["longer"] = comparison(2400, **{BASELINE: 2.5, DEFAULT: 2.4})
    assert "still there and smaller" in judge.explanations(found)[-1]


def test_without_a_gain_there_is_nothing_to_explain() -> None:
    found = {"forms": comparison(**{BASELINE: 3.0, DEFAULT: 3.0, ROW_SUM: 3.0})}
    assert judge.explanations(found)[0].startswith("No gain of range is shown to explain")
    assert "not decided" in judge.explanations(found)[1]


def test_the_mean_over_positions_is_paired_by_seed() -> None:
    plans = {
        "forms": comparison(**{BASELINE: 3.0, DEFAULT: 2.9}),
        "t5": comparison(**{BASELINE: 3.2, DEFAULT: 3.0}),
        "longer": comparison(**{BASELINE: 3.2, DEFAULT: 2.0}),
    }
    (row,) = judge.over_positions(plans)
    assert row["positions"] == ["rope", "t5"]
    assert row["mean"] == pytest.approx(-0.15, abs=0.005)


# ---- (c) ----


def test_what_is_looked_at_is_what_attend_says() -> None:
    torch.manual_seed(0)
    q, k, v = (3.0 * torch.randn(2, 2, 12, 8) for _ in range(3))
    calls = []
    with watching(calls.append):
        out = attend(q, k, v, "self_adjust", mask=Mask.causal(), want=("weights", "visible"))
    rows = saturation.look(calls[0])
    torch.testing.assert_close(rows["row_sum"], out.extras["weights"].sum(-1))
    assert (rows["count"] == out.extras["visible"]).all()
    plain = measure(dataclasses.replace(calls[0], spec=AttentionSpec()), ("max_weight", "entropy", "max_score"))
    torch.testing.assert_close(rows["largest"], plain["max_weight"])
    assert ((plain["max_score"] > 0) == rows["positive"]).all()
    torch.testing.assert_close(rows["entropy"][..., 1:] * rows["count"][..., 1:].log(), plain["entropy"][..., 1:])
    x = (q @ k.mT / 8**0.5)[0, 0, 5, :6]
    assert float(rows["inverse"][0, 0, 5]) == pytest.approx(float(1 / (x.max().clamp(min=0) - x.min().clamp(max=0))))


def test_rows_of_few_keys_are_left_out() -> None:
    rows = {name: torch.full((1, 1, 20), 0.95) for name in ("largest", "entropy", "row_sum", "score_sd")}
    rows |= {"count": torch.arange(1, 21).expand(1, 1, 20), "positive": torch.ones(1, 1, 20, dtype=torch.bool)}
    rows["largest"][..., : saturation.WIDE] = 0.1
    rows["largest"][..., saturation.WIDE - 1] = 0.995
    found = saturation.summary(rows)
    assert found["above_90"] == 1.0
    assert found["above_99"] == pytest.approx(1 / 13)


def test_spikes_are_found_where_d_is_small() -> None:
    import numpy as np

    watcher = saturation.Watcher(1)
    norms = np.ones(400)
    norms[[150, 250, 350]] = 50.0
    watcher.inverse = [(100.0 if norm > 1 else 1.0 + step / 400, 1) for step, norm in enumerate(norms)]
    found = saturation.spikes(norms, watcher)
    assert found is not None
    assert (found["spikes"], found["largest_inverse"], found["median_keys"]) == (3, 100.0, 1.0)
    assert found["top_share"] >= 0.75
    assert saturation.spikes(norms, saturation.Watcher(1)) is None


def test_a_watched_run_is_the_same_run_and_resumes_from_its_file(tmp_path) -> None:
    plan = dict(text.plans(seeds=2, workers=1, quick=True))[text.FORMS_PLAN]
    config = saturation.run_config(plan.arm(DEFAULT).apply(plan.base), steps=3, seed=0, rate=None)
    job = saturation.Job(DEFAULT, 0, saturation.json.dumps(config.to_dict(), sort_keys=True))
    found = saturation.trace(job)
    plain = train(config, tmp_path / "plain", progress=False)
    assert found["val"] == plain.summary["val_bits_per_byte"]
    assert len(found["layers"]) == 2
    assert found["layers"][0]["row_sum"][0] is not None
    assert saturation.key_of_run(found) == job.key
    path = tmp_path / saturation.RUNS
    path.write_text(saturation.json.dumps(found) + "\n")
    saturation.run_missing(
        path, [job], _never, key_of_job=lambda one: one.key, key_of_run=saturation.key_of_run, workers=1
    )
    assert len(path.read_text().splitlines()) == 1


def _never(job: object) -> dict[str, object]:
    raise AssertionError("a run that is there was run again")


# ---- the page ----


def test_the_page_and_the_figures_follow_from_the_results() -> None:
    names = [BASELINE, *FORMS, *EXPLAINING]
    layers = [dict.fromkeys(saturation.FIELDS, (0.25, 0.01))] * 2
    results = {
        "jacobian": jacobian.run(quick=True),
        "text": {
            "forms": comparison(**{name: 3.0 - 0.1 * (name == DEFAULT) for name in names}),
            "t5": comparison(**{BASELINE: 3.2, DEFAULT: 3.0, "range, detached": 3.2}),
            "longer": comparison(2400, **{BASELINE: 2.5, DEFAULT: 2.4, ROW_SUM: 2.4, SHAPE: 2.5}),
        },
        "saturation": {
            "final": {BASELINE: layers},
            "traced": [
                {
                    "arm": BASELINE, "seed": 0, "steps": [1.0, 2.0], "spikes": None,
                    "layers": [{field: [0.1, 0.2] for field in saturation.FIELDS}] * 2,
                }
            ],
        },
    }  # fmt: skip
    lines = report.page(results)
    assert any(line.startswith("| range | ") and "| better |" in line for line in lines)
    assert any("alive, in the row sum alone" in line for line in lines)
    assert any("25.0% / 25.0%" in line for line in lines)
    assert all(svg.startswith("<svg") and "nan" not in svg for svg in report.figures(results).values())
    assert report.page({}) == []
