"""What one training run is: model, data, optimizer and loop in frozen values. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from clearhead.data.config import DataConfig
from clearhead.errors import UserError, unknown
from clearhead.models.config import ModelConfig
from clearhead.models.pretrained_config import ARCHITECTURE as PRETRAINED
from clearhead.models.pretrained_config import PretrainedConfig
from clearhead.objectives.config import ObjectiveConfig, pooled_layers

ScheduleName = Literal["cosine", "wsd", "constant"]
Precision = Literal["fp32", "bf16"]
Parallel = Literal["none", "ddp", "fsdp"]

Task = Literal["causal_lm", "masked_lm", "translation"]

TASKS: dict[str, Task] = {
    "decoder": "causal_lm",
    "encoder": "masked_lm",
    "seq2seq": "translation",
    "feedback": "causal_lm",
    PRETRAINED: "causal_lm",
}
"""What each architecture is trained for."""
DECODERS = tuple(name for name, task in TASKS.items() if task == "causal_lm")
"""Architectures that continue text."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning rate over time. Raises `UserError` for a value that makes no sense."""

    lr: float = 3e-3
    """Peak learning rate; a parameter group may scale it (temperatures do)."""
    min_lr_fraction: float = 0.1
    """The last step's learning rate as a share of the peak."""
    schedule: ScheduleName = "cosine"
    """cosine | wsd (warm-up, stable, linear decay) | constant; each begins with the warm-up."""
    warmup_steps: int = 50
    """Steps over which the rate rises linearly to the peak; 0 = none."""
    decay_fraction: float = 0.2
    """wsd only: the share of all steps that the decay at the end takes."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices; temperatures, norms, biases and embeddings have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running mean and of the running square of the gradient."""
    eps: float = 1e-8
    """Added to the root of the running square."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this total norm; None = measured only."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", _betas(self.betas))
        _number("optim.lr", self.lr, above=0.0)
        _number("optim.min_lr_fraction", self.min_lr_fraction, least=0.0, most=1.0)
        _choice("optim.schedule", self.schedule, get_args(ScheduleName))
        _count("optim.warmup_steps", self.warmup_steps, least=0)
        _number("optim.decay_fraction", self.decay_fraction, above=0.0, most=1.0)
        _number("optim.weight_decay", self.weight_decay, least=0.0)
        _number("optim.eps", self.eps, above=0.0)
        if self.clip_norm is not None:
            _number("optim.clip_norm", self.clip_norm, above=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON; `from_dict` brings back an equal config."""
        return dataclasses.asdict(self) | {"betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OptimConfig:
        """Build from plain values; an unknown key raises `UserError` with the nearest known one."""
        return cls(**_known(cls, "optim", values))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop. The budget is `steps` or `tokens`, exactly one of them. Raises `UserError` otherwise."""

    steps: int | None = None
    """Optimizer steps."""
    tokens: int | None = None
    """Positions to read, rounded up to whole steps of batch_size * context."""
    batch_size: int = 16
    """Windows in one optimizer step, all micro-batches and all processes together. Neither `grad_accum` nor the
    number of processes changes what a step learns from."""
    grad_accum: int = 1
    """Micro-batches that a step is cut into, to save memory."""
    seed: int = 0
    """Decides the first weights, the order of the data and the dropout."""
    precision: Precision = "fp32"
    """fp32 | bf16 (autocast; weights, optimizer and loss stay fp32)."""
    compile: bool = False
    """Run the model through torch.compile."""
    eval_every: int = 100
    """Steps between evaluations on the validation text; 0 = only after the last step."""
    eval_tokens: int = 32768
    """Tokens that each evaluation scores, always the same ones, spread over all documents."""
    test_tokens: int | None = None
    """Tokens of the test text that are scored at the end; None = all of it."""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0 = only after the last step and when the run is stopped."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    inspect_every: int = 0
    """Steps between looks inside the model (lines "signal" in metrics.jsonl, and warnings: signal/watch.py), each about
    as dear as a step or two; 0 = never. It changes nothing in the weights."""
    threads: int | None = None
    """Threads of a CPU operation. None = torch's own choice at the first start, which a resumed run keeps.
    Results repeat bit by bit for an equal number of threads only."""
    device: str = "auto"
    """auto (a GPU when there is one) | cpu | cuda | cuda:1 | mps."""
    parallel: Parallel = "none"
    """none | ddp | fsdp; the latter two are started by torchrun."""
    mask_fraction: float = 0.15
    """masked_lm only: share of the tokens that are hidden."""
    label_smoothing: float = 0.0
    """translation only: share of the target that is spread over the vocabulary. Reported losses are without it."""
    beams: int = 1
    """translation only: width of the search for the translations that are scored at the end; 1 = greedy."""
    length_penalty: float = 0.6
    """translation only: 0 = the search prefers short translations, 1 = it looks at the mean per token."""
    diverged_after: int = 5
    """So many steps in a row without a finite loss and gradient end the run as diverged."""
    tensorboard: bool = False
    """Write TensorBoard files too (metrics.jsonl is always written)."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.tokens is None):
            given = "neither" if self.steps is None else f"both ({self.steps} and {self.tokens})"
            raise UserError(
                f"train: expected exactly one of steps and tokens, got {given}; set one, leave the other out"
            )
        _number("train.mask_fraction", self.mask_fraction, above=0.0, most=1.0)
        _number("train.label_smoothing", self.label_smoothing, least=0.0, most=0.99)
        _number("train.length_penalty", self.length_penalty, least=0.0)
        for name in ("batch_size", "grad_accum", "eval_tokens", "log_every", "diverged_after", "beams"):
            _count(f"train.{name}", getattr(self, name))
        for name in ("steps", "tokens", "test_tokens", "threads"):
            if getattr(self, name) is not None:
                _count(f"train.{name}", getattr(self, name))
        for name in ("seed", "eval_every", "checkpoint_every", "inspect_every"):
            _count(f"train.{name}", getattr(self, name), least=0)
        for name in ("compile", "tensorboard"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"train.{name}: expected true or false, got {getattr(self, name)!r}")
        if not isinstance(self.device, str) or not self.device:
            raise UserError(f"train.device: expected auto, cpu, cuda, cuda:1 or mps, got {self.device!r}")
        _choice("train.precision", self.precision, get_args(Precision))
        _choice("train.parallel", self.parallel, get_args(Parallel))
        if self.batch_size % self.grad_accum:
            raise UserError(
                f"train.batch_size: expected a multiple of grad_accum={self.grad_accum}, got {self.batch_size}; "
                f"batch_size counts the windows of a whole step"
            )

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON; `from_dict` brings back an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from plain values; an unknown key raises `UserError` with the nearest known one."""
        return cls(**_known(cls, "train", values))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run's result, and how it is carried out. Hashable; equal configs give equal runs.

    Raises `UserError` where two parts disagree: the contexts, too small a vocabulary, a warm-up without end.
    """

    train: TrainConfig
    model: ModelConfig | PretrainedConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self) -> None:
        if self.model.context != self.data.context:
            raise UserError(
                f"model.context={self.model.context} and data.context={self.data.context} differ; set both to the "
                f"length to train on"
            )
        self._check_task()
        self._check_objective()
        if isinstance(self.model, PretrainedConfig):
            self._check_pretrained(self.model)
        tokenizer, needed = self.data.tokenizer, vocabulary_size(self.data, self.task)
        if self.model.vocab_size < needed:
            mask = ", the mask included" if self.task == "masked_lm" else ""
            raise UserError(
                f"model.vocab_size={self.model.vocab_size} is too small for the tokenizer {tokenizer!r}, which has "
                f"{needed} ids{mask}; set model.vocab_size={needed}"
            )
        if self.optim.warmup_steps >= self.total_steps and self.total_steps > 1:
            raise UserError(
                f"optim.warmup_steps={self.optim.warmup_steps}: expected fewer than the {self.total_steps} steps of "
                f"the run; lower it or train longer"
            )

    def _check_task(self) -> None:
        start, task = {entry.name: entry.default for entry in dataclasses.fields(TrainConfig)}, self.task
        only = {"mask_fraction": "masked_lm"} | dict.fromkeys(
            ("label_smoothing", "beams", "length_penalty"), "translation"
        )
        for name, owner in only.items():
            if owner != task and getattr(self.train, name) != start[name]:
                raise UserError(
                    f"train.{name} is for {owner}; this run is {task} (model.architecture={self.model.architecture})"
                )
        if self.model.architecture == "feedback":
            if self.train.parallel == "fsdp":
                raise UserError(
                    "train.parallel=fsdp: layers of architecture=feedback share key and value matrices, which a block "
                    "cannot shard alone; take ddp"
                )
            if self.train.inspect_every:
                raise UserError(
                    "train.inspect_every: architecture=feedback runs its blocks once a token, which the measurement "
                    "does not know; set it to 0"
                )
        if self.data.synthetic is not None:
            if task == "translation":
                raise UserError(f"data.source={self.data.source} is for causal_lm and masked_lm; this run is {task}")
            if self.train.mask_fraction != start["mask_fraction"]:
                raise UserError("train.mask_fraction: a generated task says itself what is asked; leave it out")
        if task == "translation" and self.train.tokens is not None:
            raise UserError("train.tokens: pairs differ in length, so translation counts steps; set train.steps")

    def _check_pretrained(self, model: PretrainedConfig) -> None:
        if self.data.tokenizer != "pretrained" or self.data.tokenizer_of != model.source:
            raise UserError(
                f"data.tokenizer={self.data.tokenizer}: {model.source} knows the ids of its own tokenizer alone; set "
                f"data.tokenizer=pretrained and data.tokenizer_of={model.source}"
            )
        if self.data.synthetic is not None:
            raise UserError(f"data.source={self.data.source}: a pretrained model reads text, no generated symbols")
        if self.train.parallel == "fsdp":
            raise UserError("train.parallel=fsdp: a pretrained model's blocks are not ours to shard; take ddp")
        if self.train.inspect_every:
            raise UserError(
                "train.inspect_every looks inside clearhead's own models; set it to 0 and inspect the exported folder: "
                "clearhead inspect --model FOLDER"
            )

    def _check_objective(self) -> None:
        objective = self.objective
        if not objective.reads_segments:
            return
        if isinstance(self.model, PretrainedConfig):
            raise UserError("objective.nsp: a pretrained model learns the next token alone; leave the objective plain")
        if self.task == "translation":
            raise UserError(
                "objective.nsp: translation reads sentence pairs, which have no next segment; leave the objective plain"
            )
        if self.data.synthetic is not None:
            raise UserError(
                f"objective.nsp: data.source={self.data.source} has samples and no running text to cut into segments; "
                f"leave the objective plain"
            )
        if objective.raml and self.task != "causal_lm":
            raise UserError(
                f"objective.raml: {self.task} gives no probability of a segment given another, an encoder sees it from "
                f"both sides; objective.nsp works with it"
            )
        if self.train.parallel != "none":
            raise UserError(
                f"train.parallel={self.train.parallel}: the critic, and weights over all pairs of a step, live in one "
                f"process; set train.parallel=none, or leave the objective plain"
            )
        pooled_layers(objective.pooled, self.own_model.layers)
        longest = objective.segment_length * (2 if objective.raml else 1)
        if self.own_model.position == "learned" and longest > self.model.context:
            raise UserError(
                f"objective.segments={objective.segments}: {longest} tokens are read at once, but learned positions "
                f"end at context={self.model.context}; cut shorter segments"
            )

    @property
    def own_model(self) -> ModelConfig:
        """The model's config, which is known here to be one of clearhead's own and not a pretrained model's."""
        if not isinstance(self.model, ModelConfig):
            raise TypeError(f"expected a model of clearhead's own, got the pretrained {self.model.source}")
        return self.model

    @property
    def task(self) -> Task:
        """What the model's architecture is trained for: causal_lm | masked_lm | translation."""
        return TASKS[self.model.architecture]

    @property
    def score(self) -> str:
        """What the run is judged by: bits_per_byte | bits_per_answer | loss (nats per token)."""
        if self.data.synthetic is not None:
            return "bits_per_answer"
        return "bits_per_byte" if self.task == "causal_lm" else "loss"

    @property
    def tokens_per_step(self) -> int:
        """Positions that one optimizer step reads: batch_size * context; of a translation, at most."""
        return self.train.batch_size * self.data.context

    @property
    def total_steps(self) -> int:
        """The budget in optimizer steps."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None  # TrainConfig checked that one is given
        return math.ceil(self.train.tokens / self.tokens_per_step)

    def to_dict(self) -> dict[str, Any]:
        """The parts as plain values, ready for JSON; `from_dict` brings back an equal config."""
        return {part.name: getattr(self, part.name).to_dict() for part in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Build from plain values; an unknown key raises `UserError` with the nearest known one."""
        kinds: dict[str, Any] = {
            "model": PretrainedConfig if is_pretrained(values.get("model")) else ModelConfig,
            "data": DataConfig,
            "optim": OptimConfig,
            "objective": ObjectiveConfig,
            "train": TrainConfig,
        }
        values = dict(values)
        said = values.pop("task", None)  # may be written into a config by hand; the architecture decides
        parts = _known(cls, "run", values)
        for name, part in parts.items():
            if not isinstance(part, Mapping):
                raise UserError(f"run config: {name} must be an object of options, got {type(part).__name__}")
        if "train" not in parts:
            raise UserError("run config: train is missing; give at least train.steps or train.tokens")
        config = cls(**{name: kinds[name].from_dict(part) for name, part in parts.items()})
        if said is not None and said != config.task:
            if said not in TASKS.values():
                raise unknown("task", str(said), TASKS.values())
            wanted = next(name for name, task in TASKS.items() if task == said)
            raise UserError(
                f"task={said} needs model.architecture={wanted}, got {config.model.architecture}, which is for "
                f"{config.task}"
            )
        return config


def is_pretrained(model: object) -> bool:
    """Whether plain values describe a pretrained model (a `PretrainedConfig`) and not one of clearhead's own."""
    return isinstance(model, Mapping) and model.get("architecture") == PRETRAINED


def vocabulary_size(data: DataConfig, task: Task) -> int:
    """Ids that a model needs at least: the tokenizer's, and one for the mask of a masked LM."""
    return data.ids + (task == "masked_lm")


def _known(cls: Any, section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    names = [entry.name for entry in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise unknown(f"key in {section}", str(key), names)
    return dict(values)


def _count(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def _number(
    name: str, value: object, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name}: expected a finite number, got {value!r}")
    if not (value > above and least <= value <= most):
        low = f"above {above:g}" if above > -math.inf else f"of at least {least:g}"
        raise UserError(
            f"{name}: expected a number {low}{f' and at most {most:g}' if most < math.inf else ''}, got {value}"
        )


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise unknown(name, str(value), choices)


def _betas(value: Any) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise UserError(f"optim.betas: expected two numbers such as 0.9 0.95, got {value!r}")
    for beta in value:
        _number("optim.betas", beta, least=0.0, most=1.0)
        if beta == 1:
            raise UserError("optim.betas: expected numbers below 1; at 1 nothing is ever forgotten")
    return (float(value[0]), float(value[1]))
