"""What each arm comes to before anything runs: parameters, operations, steps. Building every model here also finds an
arm that cannot be built before any other has trained for nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from clearhead.compare.arms import config_difference
from clearhead.compare.plan import ComparePlan
from clearhead.errors import UserError
from clearhead.models.make import begin_model
from clearhead.train.config import RunConfig
from clearhead.train.tasks.segments import extra_cost_of


def resolve(plan: ComparePlan, step_seconds: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Return, for each arm, what differs from the baseline arm, parameters, FLOPs per token, steps and tokens.

    The budget is that of the baseline arm's configuration. With T tokens per step, F operations per token, and s the
    probe's seconds per step, an arm gets

        tokens   steps = steps(base) * T(base) / T
        flops    steps = steps(base) * T(base) F(base) / (T F)
        time     steps = steps(base) * s(base) / s

    rounded to whole steps. `step_seconds` is needed for "time" only.
    """
    configs = {arm.name: arm.apply(plan.base) for arm in plan.arms}
    baseline = configs[plan.baseline]
    sizes = {name: _size(name, config) for name, config in configs.items()}
    base_cost = _cost(plan.budget, plan.baseline, baseline, sizes[plan.baseline], step_seconds)
    arms: dict[str, Any] = {}
    for name, config in configs.items():
        cost = _cost(plan.budget, name, config, sizes[name], step_seconds)
        steps = max(1, round(baseline.total_steps * base_cost / cost))
        flops, own = sizes[name]["flops_per_token"], sizes[plan.baseline]
        arms[name] = {
            "difference": config_difference(baseline, config),
            "parameters": sizes[name]["parameters"],
            "parameters_ratio": sizes[name]["parameters"]["total"] / own["parameters"]["total"],
            "flops_per_token": flops,
            "flops_ratio": flops / own["flops_per_token"],
            "tokens_per_step": config.tokens_per_step,
            "extra_tokens_per_step": sizes[name]["extra_tokens_per_step"],
            "steps": steps,
            "tokens": steps * config.tokens_per_step,
            "flops": steps * config.tokens_per_step * flops,
        }
    return {"budget": {"kind": plan.budget, "words": _budget_words(plan, arms)}, "arms": arms}


def run_config(config: RunConfig, *, steps: int, seed: int, rate: float | None) -> RunConfig:
    """Return an arm's configuration for one run."""
    train = dataclasses.replace(config.train, steps=steps, tokens=None, seed=seed)
    optim = config.optim if rate is None else dataclasses.replace(config.optim, lr=rate)
    return dataclasses.replace(config, train=train, optim=optim)


def _size(name: str, config: RunConfig) -> dict[str, Any]:
    try:
        model: Any = begin_model(config.model)
    except ValueError as error:
        raise UserError(f"arm {name!r} cannot be built: {error}") from error
    extra = extra_cost_of(model, config)  # an objective beside the task's: what it reads counts, by token of the task
    return {
        "parameters": model.count_parameters(),
        "flops_per_token": model.flops_per_token(config.data.context) + extra.flops / config.tokens_per_step,
        "extra_tokens_per_step": extra.tokens,
    }


def _cost(
    budget: str, name: str, config: RunConfig, size: Mapping[str, Any], step_seconds: Mapping[str, float] | None
) -> float:
    if budget == "time":
        if step_seconds is None or name not in step_seconds:
            raise UserError(f"budget time: the speed probe has no figure for arm {name!r}; run the comparison again")
        return step_seconds[name]
    per_token = size["flops_per_token"] if budget == "flops" else 1.0
    return float(config.tokens_per_step * per_token)


def _budget_words(plan: ComparePlan, arms: Mapping[str, Any]) -> str:
    base = arms[plan.baseline]
    equal = {
        "tokens": "Every arm reads the same number of tokens",
        "flops": "Every arm spends the same number of floating point operations (by the model's own count)",
        "time": "Every arm trains for the same time (steps scaled by the speed probe)",
    }[plan.budget]
    counts = {name: (arm["steps"], arm["tokens"]) for name, arm in arms.items()}
    if len(set(counts.values())) == 1:
        return f"{equal}: {base['steps']:,} steps, {base['tokens']:,} tokens."
    each = "; ".join(f"{name} {steps:,} steps, {tokens:,} tokens" for name, (steps, tokens) in counts.items())
    return f"{equal}: {each}."
