"""This library, called as its users call it. The option is a spec; "gpt SPEC" trains the decoder in GPT's form."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from clearhead.attention.attend import attend
from clearhead.attention.mask import Mask
from clearhead.attention.selective import Temperatures
from clearhead.bench.prepared import Attend, Problem, Step, Training
from clearhead.memory.cache import KVCache


def attention(option: str, problem: Problem) -> Attend:
    """`attend` with a causal mask."""
    mask, taus = Mask.causal(), problem.temperatures(option)
    temperatures = Temperatures(**taus) if taus else None
    return lambda q, k, v: attend(q, k, v, option, mask=mask, temperatures=temperatures).out


def decode(option: str, problem: Problem) -> Callable[[], Tensor]:
    """`attend` with a `KVCache` that holds all tokens but the last."""
    mask, taus = Mask.causal(), problem.temperatures(option)
    q, k, v = problem.q, problem.k, problem.v
    b, h, n, d = q.shape
    cache = KVCache.allocate(b, h, n, d, dtype=q.dtype, device=q.device)
    if n > 1:
        first = {name: t if t.shape[2] == 1 else t[:, :, :-1] for name, t in taus.items()}
        before = Temperatures(**first) if taus else None
        attend(q[:, :, :-1], k[:, :, :-1], v[:, :, :-1], option, mask=mask, temperatures=before, state=cache)
    query, key, value, last = q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], problem.last(taus)
    mark = cache.mark()

    def run() -> Tensor:
        out = attend(query, key, value, option, mask=mask, temperatures=last, state=cache).out
        cache.rollback(mark)
        return out

    return run


def step(option: str, training: Training) -> Step:
    """The training loop's own step, as `clearhead train` and `clearhead compare` take it."""
    import dataclasses

    from clearhead.train.optimizer import build_optimizer
    from clearhead.train.step import MicroBatch, train_step
    from clearhead.train.world import World

    form, _, spec = option.rpartition(" ")
    model = training.decoder(spec, form or "llama")
    optim = dataclasses.replace(training.model.optim, lr=training.learning_rate)
    optimizer = build_optimizer(model.parameter_groups(), optim)  # type: ignore[operator]
    world = World(0, 1, training.device, "none")
    batch = MicroBatch(training.inputs, training.targets, None)

    def run() -> object:
        return train_step(
            model, optimizer, [batch], valid_tokens=training.targets.numel(), clip_norm=optim.clip_norm, world=world
        )

    return Step(model, run, model.embedding.weight)  # type: ignore[union-attr, arg-type]
