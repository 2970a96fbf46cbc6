from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from clearhead.compare import costs
from clearhead.compare.arms import Arm, config_difference
from clearhead.compare.plan import DEFAULT, GRID, PRESETS, ComparePlan
from clearhead.errors import UserError


def test_importing_a_plan_needs_no_torch():
    code = "import sys, clearhead.compare.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("text", "name", "overrides"),
    [
        ("gated: model.output_gate=head", "gated", {"model.output_gate": "head"}),
        ("gated:model.output_gate=head optim.lr=1e-3", "gated", {"model.output_gate": "head", "optim.lr": "1e-3"}),
        ("window:64: model.attention=window:64", "window:64", {"model.attention": "window:64"}),
        ("form: model.attention=self_adjust:form=product", "form", {"model.attention": "self_adjust:form=product"}),
        ("my text: data.source='a b.txt'", "my text", {"data.source": "a b.txt"}),
        ("base:", "base", {}),
    ],
)
def test_arms_are_read_and_printed(text, name, overrides):
    arm = Arm.parse(text)
    assert (arm.name, arm.overrides) == (name, overrides)
    assert Arm.parse(arm.text()) == arm


@pytest.mark.parametrize(
    "text", ["gated", "model.output_gate=head", "a: model.width", "a: optim.lr=1 optim.lr=2", ": x=1"]
)
def test_unreadable_arms_are_refused(text):
    with pytest.raises(UserError, match="arm"):
        Arm.parse(text)


def test_attention_specs_become_arms_named_by_their_canonical_form():
    plan = ComparePlan.build(attention=["softmax+mean", "selective+laser", "self_adjust:range"])
    assert [arm.name for arm in plan.arms] == ["softmax", "laser+selective", "self_adjust"]
    assert plan.baseline == "softmax"


def test_values_get_the_type_of_their_field():
    text = "all: optim.lr=2e-3 optim.betas=0.9,0.99 model.kv_heads=1 model.qk_norm=true optim.clip_norm=none"
    config = Arm.parse(text).apply(DEFAULT)
    assert (config.optim.lr, config.optim.betas, config.optim.clip_norm) == (2e-3, (0.9, 0.99), None)
    assert (config.model.kv_heads, config.model.qk_norm) == (1, True)
    with pytest.raises(UserError, match=r"arm 'a': model\.width: expected a whole number, got 'wide'"):
        Arm.parse("a: model.width=wide").apply(DEFAULT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": ["softmax", "lazer"]}, "did you mean 'laser'"),
        ({"attention": ["softmax", "self_adjust+laser"]}, "shift"),
        ({"arms": ["a: model.atention=laser"]}, "did you mean 'model.attention'"),
        ({"arms": ["a: attention=laser"]}, "did you mean 'model.attention'"),
        ({"arms": ["a: data.source=other"]}, "same text"),
        ({"arms": ["a: train.seed=3"]}, "seeds belong to the plan"),
        ({"arms": ["a: train.steps=3"]}, "budget"),
        ({"attention": ["softmax", "softmax+full"]}, "two arms are called 'softmax'"),
        ({"attention": ["softmax"], "arms": ["same: model.attention=softmax"]}, "same configuration under two names"),
        ({"arms": ["A b: model.width=64", "a-b: model.width=32"]}, "too alike"),
        ({"attention": ["softmax"]}, "called 'softmax'"),
        ({"baseline": "lasr"}, "did you mean 'laser'"),
        ({"preset": "quik"}, "did you mean 'quick'"),
        ({"budget": "flop"}, "did you mean 'flops'"),
        ({"seeds": 1}, "at least 2 are needed for an interval"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": [0, 1000]}, "from 0 to 999"),
        ({"workers": 0}, "workers"),
        ({"steps": 0}, "steps"),
        ({"learning_rates": [1e-3]}, "at least two"),
        ({"learning_rates": [1e-3, 2e-3], "arms": ["a: optim.lr=1", "b: model.width=48"]}, "grid of learning rates"),
        ({"overrides": {"model.widht": 64}}, "did you mean 'model.width'"),
        ({"overrides": ["model.width"]}, "key=value"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        ComparePlan.build(**changes)
    assert "\n" not in str(caught.value)


def test_a_single_arm_is_compared_with_the_base():
    plan = ComparePlan.build(arms=["gated: model.output_gate=head"])
    assert [arm.name for arm in plan.arms] == ["softmax", "gated"]
    assert plan.arms[0].apply(plan.base) == plan.base


def test_steps_move_the_warm_up_and_the_evaluations_along():
    plan = ComparePlan.build(steps=160)
    assert (plan.base.total_steps, plan.base.optim.warmup_steps, plan.base.train.eval_every) == (160, 16, 20)
    plan = ComparePlan.build(steps=160, overrides=["optim.warmup_steps=3"])
    assert plan.base.optim.warmup_steps == 3
    assert ComparePlan.build(overrides=["train.tokens=1000000"]).base.train.steps is None


def test_plans_survive_json_and_equal_plans_compare_equal(tmp_path):
    plan = ComparePlan.build(
        attention=["softmax", "laser"], arms=["b: optim.betas=0.9,0.99 optim.lr=2e-3"], seeds=[4, 7], budget="flops"
    )
    assert ComparePlan.from_dict(json.loads(plan.to_json())) == dataclasses.replace(plan, workers=None)
    same = ComparePlan.build(
        attention=["softmax", "laser"],
        arms=[Arm("b", {"optim.betas": (0.9, 0.99), "optim.lr": 0.002})],
        seeds=[4, 7],
        budget="flops",
        workers=1,
        folder=tmp_path,
    )
    assert plan.differences(same) == []


def test_differences_are_said_in_words():
    plan = ComparePlan.build()
    other = ComparePlan.build(attention=["softmax", "laser"], seeds=3, overrides={"model.width": 64, "model.heads": 2})
    said = "; ".join(plan.differences(other))
    assert "seeds: [0, 1, 2] there, [0, 1, 2, 3, 4] here" in said
    assert "arm 'self_adjust' is only here" in said
    assert "model.width: 64 there, 96 here" in said
    assert plan.differences(ComparePlan.build(attention=[arm.name for arm in reversed(plan.arms)], baseline="softmax"))


def test_folders():
    assert ComparePlan.build().default_folder() == Path("compare-default")
    assert ComparePlan.build(workers=1).default_folder() == Path("compare-default")
    other = ComparePlan.build(seeds=4).default_folder()
    assert other.name.startswith("compare-default-")
    assert other == ComparePlan.build(seeds=4).default_folder()
    assert Arm("self_adjust:form=product+window:64").slug == "self_adjust-form=product+window-64"


def test_presets_are_what_the_documentation_says():
    assert set(PRESETS) == {"quick", "default", "thorough"}
    for plan in PRESETS.values():
        assert [arm.name for arm in plan.arms] == ["softmax", "laser", "self_adjust", "softmax+selective"]
        assert (plan.base.data.source, plan.base.data.tokenizer) == ("shakespeare", "bytes")
        assert (plan.base.train.threads, plan.base.train.log_every, plan.budget) == (1, 1, "tokens")
    assert len(PRESETS["default"].seeds) == 5
    assert PRESETS["thorough"].learning_rates == GRID
    assert DEFAULT.optim.lr in GRID


def test_config_difference_is_exact():
    arm = Arm("a", {"model.attention": "laser", "optim.lr": 1e-3, "model.width": DEFAULT.model.width})
    assert config_difference(DEFAULT, arm.apply(DEFAULT)) == [
        {"key": "model.attention", "baseline": "softmax", "value": "laser"},
        {"key": "optim.lr", "baseline": DEFAULT.optim.lr, "value": 1e-3},
    ]


def test_budgets_give_each_arm_its_steps():
    arms = ["base:", "wide: model.width=192", "batch: train.batch_size=8"]
    made = costs.resolve(ComparePlan.build(arms=arms))["arms"]
    assert [made[n]["steps"] for n in ("base", "wide", "batch")] == [1600, 1600, 800]
    assert len({arm["tokens"] for arm in made.values()}) == 1

    resolved = costs.resolve(ComparePlan.build(arms=arms, budget="flops"))
    made = resolved["arms"]
    spent = [arm["flops"] for arm in made.values()]
    assert spent == pytest.approx([spent[0]] * 3, rel=2e-3)  # whole steps
    assert made["wide"]["flops_ratio"] == pytest.approx(
        made["wide"]["flops_per_token"] / made["base"]["flops_per_token"]
    )
    assert "wide" in resolved["budget"]["words"]

    made = costs.resolve(ComparePlan.build(arms=arms, budget="time"), {"base": 0.01, "wide": 0.02, "batch": 0.016})
    assert [arm["steps"] for arm in made["arms"].values()] == [1600, 800, 1000]
    with pytest.raises(UserError, match="no figure"):
        costs.resolve(ComparePlan.build(arms=arms, budget="time"), {"base": 0.01})


def test_a_feedback_model_may_be_an_arm_or_the_base():
    """With matrices of its own in each layer it has the plain decoder's parameters, a mixture of 3 and a norm."""
    own = "feedback: model.architecture=feedback model.feedback_share_kv=false"
    carried = f"{own.replace('feedback:', 'carried:', 1)} model.feedback_carry=true"
    plan = ComparePlan.build(preset="quick", arms=["plain:", own, carried], steps=10)
    found = costs.resolve(plan)["arms"]
    sizes = {name: arm["parameters"]["total"] for name, arm in found.items()}
    assert sizes["feedback"] - sizes["plain"] == 3 + plan.base.model.width
    assert sizes["carried"] == sizes["feedback"]
    assert {arm["steps"] for arm in found.values()} == {10}
    base = ComparePlan.build(
        preset="quick", arms=["a:", "b: model.layers=1"], overrides=["model.architecture=feedback"]
    )
    assert base.arm("b").apply(base.base).model.architecture == "feedback"


def test_a_run_has_its_own_seed_rate_and_steps():
    plan = ComparePlan.build(steps=100)
    made = costs.run_config(plan.base, steps=50, seed=7, rate=0.5)
    assert (made.train.seed, made.optim.lr, made.total_steps, made.train.tokens) == (7, 0.5, 50, None)
    assert costs.run_config(plan.base, steps=50, seed=7, rate=None).optim.lr == plan.base.optim.lr


def test_a_longer_context_keeps_the_tokens_of_a_run():
    start = ComparePlan.build().base
    plan = ComparePlan.build(attention=["softmax", "window:256", "bigbird", "performer"], context=4096)
    base = plan.base
    assert (base.model.context, base.data.context, base.train.batch_size) == (4096, 4096, 1)
    assert base.total_steps * base.tokens_per_step == start.total_steps * start.tokens_per_step
    assert base.optim.warmup_steps == start.optim.warmup_steps * base.total_steps // start.total_steps
    assert ComparePlan.build(context=256).base.train.batch_size == start.train.batch_size // 2
    told = ComparePlan.build(context=256, steps=7, overrides=["train.batch_size=3"]).base
    assert (told.train.batch_size, told.total_steps) == (3, 7)
    with pytest.raises(UserError, match="context"):
        ComparePlan.build(context=0)
