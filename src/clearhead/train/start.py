"""A run's first model: drawn from its seed, and where the initialisation asks for data, from the run's own.

deepscale reads how often tokens repeat in the training split; the model's config then says the correlation, and with
it the config.json of every checkpoint. admin is profiled on the run's first batch, before step 0. Both are functions of
the run's config alone. A run that goes on draws the same model and then reads its checkpoint, which holds omega and the
sign that it was profiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from clearhead.init.admin import needs_profile, profile_omega
from clearhead.init.embedding_correlation import config_correlation
from clearhead.models.choices import DEEPSCALE
from clearhead.models.config import ModelConfig
from clearhead.models.make import AnyModel, begin_model
from clearhead.models.pretrained_config import PretrainedConfig
from clearhead.objectives.cross_entropy import IGNORE
from clearhead.objectives.masked_lm import TO_MASK, TO_RANDOM
from clearhead.signal.moments.embedding import repetition
from clearhead.train.config import RunConfig
from clearhead.train.tasks.task import Task
from clearhead.train.world import World

if TYPE_CHECKING:
    from clearhead.hf.model import Pretrained


def start_model(
    config: RunConfig, task: Task, world: World, build: Callable[[ModelConfig, int], AnyModel], *, resumed: bool
) -> AnyModel | Pretrained:
    """Return the model of a run on this process's device, in training mode. Every process must call it alike.

    build: makes a model of our own from its config and a seed.
    resumed: a checkpoint will be read into it, so it is not profiled.
    """
    wanted = config.model
    if isinstance(wanted, PretrainedConfig):
        return begin_model(wanted, config.train.seed).to(world.device)
    reads_tokens = wanted.init in DEEPSCALE or (wanted.init == "admin" and wanted.admin_omega == "predicted")
    if reads_tokens and wanted.embedding_correlation is None:
        r0 = config_correlation(wanted, training_repetition(config, task), same_segment=1.0)  # training names no types
        wanted = dataclasses.replace(wanted, embedding_correlation=r0)
    model = build(wanted, config.train.seed).to(world.device)
    if not resumed and needs_profile(model):
        batch = task.read(0, world)[0][0]
        profile_omega(model, lambda called: batch.loss(called), masks=_padding(batch), seed=config.train.seed)
    return model


def training_repetition(config: RunConfig, task: Task) -> float:
    """sum p^2 over the tokens that the model reads in training.

    Of pairs: the mean of the two sides. Of masked text: a share of the tokens is the mask token.
    """
    data: Any = task.data
    if config.task == "translation":
        sides = [np.bincount(np.concatenate([np.asarray(x) for x in side])) for side in zip(*data.pairs("train"))]
        return sum(repetition(counts) for counts in sides) / 2
    found = repetition(np.bincount(np.asarray(data.stream("train"))))
    if config.task == "masked_lm" and config.data.synthetic is None:
        hidden = config.train.mask_fraction
        return (1.0 - (TO_MASK + TO_RANDOM) * hidden) ** 2 * found + (TO_MASK * hidden) ** 2
    return found


def _padding(batch: Any) -> Mapping[str, Tensor | None]:
    """Which positions of a micro-batch are real, by stack; windows of running text have no padding."""
    if not hasattr(batch, "source_valid_bs"):
        return {}
    return {"encoder": batch.source_valid_bs, "decoder": batch.targets_bt != IGNORE}
