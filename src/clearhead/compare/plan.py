"""What is compared: `ComparePlan`, its presets, and its text form in `plan.json`.

A plan is a frozen value. Two plans that are equal give the same runs, so a folder that holds one goes on where it
stopped, and a folder that holds another is refused. How many workers run it, and where, is not part of the plan.
Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from clearhead.compare.arms import Arm, check_arms, flatten, parse_arms, read_changes, with_changes
from clearhead.data.config import DataConfig
from clearhead.errors import UserError, unknown
from clearhead.models.config import ModelConfig
from clearhead.train.config import DECODERS, OptimConfig, RunConfig, TrainConfig
from clearhead.train.finetune import finetune_config

Budget = Literal["tokens", "flops", "time"]

FORMAT = 1
TUNING_SEED = 1000
"""The learning rate is chosen on runs with seeds from here on, which the verdict never sees."""

DEFAULT_ATTENTION = ("softmax", "laser", "self_adjust", "softmax+selective")
FINETUNE = "finetune"
"""What the preset of a pretrained model is called."""
FINETUNE_ATTENTION = ("softmax", "softmax+selective", "softmax+learned")
"""Fine-tuned as it is; with temperatures that each token computes; and with plain learned ones, the control."""


@dataclass(frozen=True)
class ComparePlan:
    """Arms, seeds, budget and the base that all arms share."""

    base: RunConfig
    arms: tuple[Arm, ...]
    baseline: str
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    budget: Budget = "tokens"
    learning_rates: tuple[float, ...] = ()
    """The grid that every arm gets, chosen from by validation; empty = the one declared rate for all arms."""
    tuning_seeds: int = 2
    """Runs for each learning rate of the grid."""
    preset: str = "default"
    workers: int | None = None
    """Runs at a time; None = one for each core. Not part of the plan's identity."""
    folder: Path | None = None
    """Where it goes unless `compare` is told; None = `default_folder()`. Not part of the plan's identity."""
    sizing: Mapping[str, Any] | None = field(default=None, compare=False)
    """How `--budget-minutes` came to these steps and seeds; None for a plan that says them itself. Kept in plan.json,
    not part of the plan's identity."""

    def __post_init__(self) -> None:
        _require_decoder(self.base.model.architecture)
        check_arms(self.arms, self.base)
        object.__setattr__(self, "arms", tuple(arm.typed(self.base) for arm in self.arms))
        names = [arm.name for arm in self.arms]
        if self.baseline not in names:
            raise unknown("baseline", self.baseline, names)
        if self.budget not in get_args(Budget):
            raise unknown("budget", str(self.budget), get_args(Budget))
        if len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds: each once, got {list(self.seeds)}")
        if len(self.seeds) < 2:
            raise UserError(
                f"seeds: at least 2 are needed for an interval (5 or more for a useful one), got {len(self.seeds)}"
            )
        if any(seed < 0 or seed >= TUNING_SEED for seed in self.seeds):
            raise UserError(f"seeds: expected numbers from 0 to {TUNING_SEED - 1}, got {list(self.seeds)}")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"workers: expected at least 1, got {self.workers}")
        self._check_learning_rates()

    def _check_learning_rates(self) -> None:
        rates = self.learning_rates
        if not rates:
            return
        if len(rates) < 2 or len(set(rates)) != len(rates) or min(rates) <= 0:
            raise UserError(f"learning rates: expected at least two different ones above 0, got {list(rates)}")
        if self.tuning_seeds < 1:
            raise UserError(f"tuning seeds: expected at least 1, got {self.tuning_seeds}")
        for arm in self.arms:
            if "optim.lr" in arm.overrides:
                raise UserError(
                    f"arm {arm.name!r} sets optim.lr, and the plan has a grid of learning rates for every arm; drop one"
                )

    @classmethod
    def build(
        cls,
        *,
        preset: str = "default",
        model: str | None = None,
        attention: Sequence[str] = (),
        arms: Sequence[str | Arm] = (),
        baseline: str | None = None,
        seeds: int | Sequence[int] | None = None,
        data: str | None = None,
        context: int | None = None,
        steps: int | None = None,
        budget: str | None = None,
        learning_rates: Sequence[float] | None = None,
        overrides: Mapping[str, Any] | Iterable[str] = (),
        workers: int | None = None,
        folder: str | Path | None = None,
    ) -> ComparePlan:
        """Make a plan from a preset and what the user says differently.

        `model` is a pretrained model to fine-tune instead, a name such as smollm2 or a Hugging Face folder.

        `attention` are specs, `arms` are `Arm`s or `"name: key=value key=value"` texts; together they replace the
        preset's arms. A single one is compared with the base configuration. `overrides` change the base for every
        arm: a dict of dotted keys, or texts `"model.width=192"`. `seeds` is how many, or which.
        `steps` also moves the warm-up and the evaluations in proportion, unless `overrides` set them. `context` keeps
        the tokens of a run: a longer one makes the batch smaller, and then the steps fewer, unless told otherwise.
        """
        if preset not in PRESETS and not (preset == FINETUNE and model is not None):
            raise unknown("preset", preset, PRESETS)
        if model is not None and preset not in ("default", FINETUNE):
            raise UserError(f"preset {preset}: the presets train small models from nothing; leave it out with a model")
        start = PRESETS[preset] if model is None else finetune_plan(model)
        base = _with_base(start.base, data, context, steps, overrides)
        chosen = start.arms
        if attention or arms:
            texts = [arm for arm in arms if isinstance(arm, str)]
            made = [arm for arm in arms if isinstance(arm, Arm)]
            chosen = (*parse_arms(attention, texts), *made)
            if len(chosen) == 1:
                chosen = (Arm(f"{base.model.attention}"), *chosen)
        names = [arm.name for arm in chosen]
        if baseline is not None and baseline not in names:
            raise unknown("baseline", baseline, names)
        if isinstance(seeds, int):
            seeds = range(seeds)
        return cls(
            base=base,
            arms=chosen,
            baseline=baseline or names[0],
            seeds=start.seeds if seeds is None else tuple(seeds),
            budget=budget or start.budget,  # type: ignore[arg-type]
            learning_rates=start.learning_rates if learning_rates is None else tuple(learning_rates),
            tuning_seeds=start.tuning_seeds,
            preset=start.preset,
            workers=workers,
            folder=None if folder is None else Path(folder),
        )

    def arm(self, name: str) -> Arm:
        """Return the arm called `name`."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise unknown("arm", name, [arm.name for arm in self.arms])

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the runs, ready for JSON. Equal identities give the same runs."""
        return {
            "format": FORMAT,
            "preset": self.preset,
            "baseline": self.baseline,
            "seeds": list(self.seeds),
            "budget": self.budget,
            "learning_rates": list(self.learning_rates),
            "tuning_seeds": self.tuning_seeds,
            "arms": [{"name": arm.name, "overrides": dict(arm.overrides)} for arm in self.arms],
            "base": self.base.to_dict(),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return what plan.json holds: `identity`, and how the sizes came about where they were chosen."""
        return self.identity() | ({} if self.sizing is None else {"sizing": dict(self.sizing)})

    def to_json(self) -> str:
        """Return `to_dict` as strict JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ComparePlan:
        """Read what `identity` or `to_dict` gave."""
        if values.get("format") != FORMAT:
            raise UserError(
                f"plan.json: expected format {FORMAT}, got {values.get('format')!r}; it was written by another version"
            )
        return cls(
            base=RunConfig.from_dict(values["base"]),
            arms=tuple(Arm(arm["name"], arm["overrides"]) for arm in values["arms"]),
            baseline=values["baseline"],
            seeds=tuple(values["seeds"]),
            budget=values["budget"],
            learning_rates=tuple(values["learning_rates"]),
            tuning_seeds=values["tuning_seeds"],
            preset=values["preset"],
            sizing=values.get("sizing"),
        )

    @classmethod
    def load(cls, folder: Path) -> ComparePlan:
        """Read the plan of a comparison's folder."""
        path = Path(folder) / "plan.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls.from_dict(values)
        except FileNotFoundError:
            raise UserError(f"{folder}: no comparison there (plan.json is missing)") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a readable plan ({error})") from None

    def differences(self, other: ComparePlan) -> list[str]:
        """Say in words what differs from another plan, one line for each thing; empty when they are the same."""
        mine, theirs = self.identity(), other.identity()
        lines = [
            f"{key}: {theirs[key]} there, {mine[key]} here"
            for key in mine
            if key not in ("base", "arms") and mine[key] != theirs[key]
        ]
        here, there = {a.name: a for a in self.arms}, {a.name: a for a in other.arms}
        lines += [f"arm {name!r} is only there" for name in there if name not in here]
        lines += [f"arm {name!r} is only here" for name in here if name not in there]
        lines += [
            f"arm {name!r}: {there[name].text()} there, {here[name].text()} here"
            for name in here
            if name in there and dict(here[name].overrides) != dict(there[name].overrides)
        ]
        if list(here) != list(there) and set(here) == set(there):
            lines.append("the arms come in another order")
        a, b = flatten(other.base), flatten(self.base)
        return lines + [f"{key}: {a.get(key)} there, {b.get(key)} here" for key in b if a.get(key) != b.get(key)]

    def default_folder(self) -> Path:
        """Return `compare-PRESET`, with a short hash of the plan when it is not a preset as it stands."""
        if self.preset in PRESETS and self.identity() == PRESETS[self.preset].identity():
            return Path(f"compare-{self.preset}")
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
        return Path(f"compare-{self.preset}-{digest[:8]}")


def _with_base(
    base: RunConfig,
    data: str | None,
    context: int | None,
    steps: int | None,
    overrides: Mapping[str, Any] | Iterable[str],
) -> RunConfig:
    changes: dict[str, Any] = {}
    if isinstance(overrides, Mapping):
        changes.update(overrides)
    else:
        changes.update(read_changes(overrides))
    if data is not None:
        changes["data.source"] = data
    if context is not None:
        if isinstance(context, bool) or not isinstance(context, int) or context < 1:
            raise UserError(f"context: expected a whole number of at least 1, got {context!r}")
        batch = max(1, base.tokens_per_step // context)
        changes = {"model.context": context, "data.context": context, "train.batch_size": batch} | changes
        if steps is None and "train.steps" not in changes:
            steps = max(1, base.total_steps * base.tokens_per_step // (batch * context))
    if steps is not None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise UserError(f"steps: expected a whole number of at least 1, got {steps!r}")
        share = steps / base.total_steps
        scaled = {"optim.warmup_steps": base.optim.warmup_steps, "train.eval_every": base.train.eval_every}
        changes = {key: max(1, int(value * share)) for key, value in scaled.items()} | changes
        changes["train.steps"] = steps
    _require_decoder(changes.get("model.architecture", "decoder"))
    return with_changes(base, changes)


def _require_decoder(architecture: object) -> None:
    if architecture not in DECODERS:
        raise UserError(
            f"compare is about decoders on running text for now, got model.architecture={architecture}; train such "
            f"models one by one: clearhead train --task masked_lm | translation"
        )


def finetune_plan(source: str) -> ComparePlan:
    """Return the plan that fine-tunes a pretrained model: three arms, three seeds, the budget of `finetune_config`.

    Raises `UserError` as `finetune_config` does.
    """
    base = finetune_config(source, attention=FINETUNE_ATTENTION[0], train={"threads": 1})
    return _preset(FINETUNE, base=base, seeds=3, attention=FINETUNE_ATTENTION)


def _preset(
    name: str,
    *,
    base: RunConfig,
    seeds: int,
    learning_rates: tuple[float, ...] = (),
    attention: Sequence[str] = DEFAULT_ATTENTION,
) -> ComparePlan:
    arms = tuple(map(Arm.of_attention, attention))
    return ComparePlan(
        base=base,
        arms=arms,
        baseline=arms[0].name,
        seeds=tuple(range(seeds)),
        learning_rates=learning_rates,
        preset=name,
    )


def _small(*, width: int, steps: int, lr: float, eval_every: int, eval_tokens: int, test_tokens: int) -> RunConfig:
    """A two-layer decoder on shakespeare.

    Batches of 4, because at this size many small steps learn more than few large ones, and the small initialisation,
    because with the usual one some seeds sit on the first plateau for long and the luck of the seed hides everything.
    """
    return RunConfig(
        model=ModelConfig(vocab_size=257, layers=2, width=width, heads=width // 32, context=128, init="small"),
        data=DataConfig(source="shakespeare", context=128),
        optim=OptimConfig(lr=lr, warmup_steps=steps // 10),
        train=TrainConfig(
            steps=steps,
            batch_size=4,
            eval_every=eval_every,
            eval_tokens=eval_tokens,
            test_tokens=test_tokens,
            checkpoint_every=400,
            log_every=1,  # the tails of the gradient norm need every step
            threads=1,
        ),
    )


# Sizes come from measurement: a run of QUICK takes about 12 s of one core, a run of DEFAULT 45 to 55 s, with start
# and scoring. The rates are softmax's best of a few (2.5, 5 and 8e-3; 2, 3 and 4e-3); the grid stands around them.
QUICK = _small(width=64, steps=600, lr=2.5e-3, eval_every=100, eval_tokens=8_192, test_tokens=32_768)
DEFAULT = _small(width=96, steps=1600, lr=3e-3, eval_every=200, eval_tokens=16_384, test_tokens=131_072)
GRID = (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2)

PRESETS: dict[str, ComparePlan] = {
    "quick": _preset("quick", base=QUICK, seeds=3),
    "default": _preset("default", base=DEFAULT, seeds=5),
    "thorough": _preset("thorough", base=DEFAULT, seeds=5, learning_rates=GRID),
}
"""On two cores: quick about 2 minutes, default about 10, thorough (learning rates for each arm) half an hour."""
