"""What a training step of each arm costs: one thread takes a step of every arm in turn, so that load hits all alike.

The step is forward, backward, clipping and AdamW on random inputs of the task's shape; every position counts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from clearhead.compare.probe import summarise
from clearhead.models.make import build_model
from clearhead.train.optimizer import build_optimizer
from experiments.deep_thin.settings import Setting
from experiments.deep_thin.vit import build

WARM_UP, ROUNDS = 2, 15
PIXELS = {"digits": 4, "fashion": 49}


def measure(setting: Setting, rounds: int = ROUNDS) -> Mapping[str, Any]:
    """Median and fastest seconds of a step of each arm, and the median over rounds of its ratio to the first arm."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps = {arm.name: _step(setting, arm.name) for arm in setting.arms}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0)
    for turn in range(WARM_UP + rounds):
        shuffle.shuffle(order)
        for name in order:
            began = time.perf_counter()
            steps[name]()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    positions = setting.batch * setting.config(setting.arms[0]).context
    return summarise(seconds, setting.arms[0].name, dict.fromkeys(steps, positions))


def _step(setting: Setting, name: str) -> Callable[[], None]:
    config = setting.config(setting.arm(name))
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, config.context)
    if config.architecture == "encoder":
        patches = torch.randn(*shape, PIXELS[setting.source], generator=generator)
        model: Any = build(config, patches, 0)
        inputs: tuple[torch.Tensor, ...] = (patches,)
        targets = torch.randint(config.vocab_size, shape[:1], generator=generator)
    else:
        model = build_model(config, 0)
        tokens = torch.randint(config.vocab_size, shape, generator=generator)
        inputs = (tokens, tokens) if config.architecture == "seq2seq" else (tokens,)
        targets = tokens.flatten()
    optim = setting.optim(setting.rates[0])
    optimizer = build_optimizer(model.parameter_groups(), optim)

    def step() -> None:
        loss = F.cross_entropy(model(*inputs).flatten(0, -2), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm or float("inf"))
        optimizer.step()

    return step
