from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from clearhead.models.config import ModelConfig
from clearhead.models.decoder import Decoder
from clearhead.train.config import OptimConfig
from clearhead.train.optimizer import build_optimizer, set_learning_rate
from clearhead.train.step import MicroBatch, train_step
from clearhead.train.world import World

ALONE = World(0, 1, torch.device("cpu"), "none")
CONFIG = ModelConfig(vocab_size=11, layers=2, width=16, heads=2, context=12, attention="softmax+selective")


def build(**optim):
    model = Decoder(CONFIG)
    model.init_parameters(3)
    return model, build_optimizer(model.parameter_groups(), OptimConfig(lr=1e-2, **optim))


def uneven_rows(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 11, (rows, 12))
    targets = torch.randint(0, 11, (rows, 12))
    for row in range(rows):
        targets[row, : 2 * row] = -100
    return tokens, targets


def step(model, optimizer, micro_batches, clip_norm=None, **options):
    valid = sum(int((batch.targets_bt != -100).sum()) for batch in micro_batches)
    return train_step(model, optimizer, micro_batches, valid_tokens=valid, clip_norm=clip_norm, world=ALONE, **options)


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_accumulated_uneven_micro_batches_equal_one_batch():
    tokens, targets = uneven_rows()
    (one, one_optimizer), (many, many_optimizer) = build(), build()
    whole = step(one, one_optimizer, [MicroBatch(tokens, targets, None)])
    parts = step(many, many_optimizer, [MicroBatch(tokens[i : i + 2], targets[i : i + 2], None) for i in (0, 2, 4)])
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        # Adam's first step is about the sign of the gradient: where that is all but 0, rounding decides it.
        assert ((a - b).abs() < 1e-5).float().mean() > 0.999


def test_gradient_is_that_of_the_mean_over_valid_tokens(monkeypatch):
    """Against one cross-entropy over all tokens together, and not the mean of the micro-batches' means."""
    tokens, targets = uneven_rows()
    model, optimizer = build()
    reference = copy.deepcopy(model)
    loss = nn.functional.cross_entropy(reference(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    seen = []
    monkeypatch.setattr(optimizer, "step", lambda: seen.append(gradients(model)))
    result = step(
        model, optimizer, [MicroBatch(tokens[:1], targets[:1], None), MicroBatch(tokens[1:], targets[1:], None)]
    )
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(seen[0], gradients(reference), rtol=1e-4, atol=1e-7)

    means = [
        nn.functional.cross_entropy(reference(tokens[rows]).flatten(0, 1), targets[rows].flatten(), ignore_index=-100)
        for rows in (slice(0, 1), slice(1, None))
    ]
    assert abs(sum(means).item() / 2 - loss.item()) > 1e-4  # so the wrong division would have been seen


def test_clipping_scales_to_the_norm_and_reports_the_norm_before(monkeypatch):
    tokens, targets = uneven_rows()
    (free, free_optimizer), (clipped, clipped_optimizer) = build(), build()
    seen = {}
    monkeypatch.setattr(free_optimizer, "step", lambda: seen.update(free=gradients(free)))
    monkeypatch.setattr(clipped_optimizer, "step", lambda: seen.update(clipped=gradients(clipped)))
    a = step(free, free_optimizer, [MicroBatch(tokens, targets, None)])
    b = step(clipped, clipped_optimizer, [MicroBatch(tokens, targets, None)], clip_norm=0.01)
    assert a.grad_norm == b.grad_norm == pytest.approx(seen["free"].norm().item(), rel=1e-5)
    assert seen["clipped"].norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_leaves_weights_and_optimizer_alone(bad):
    tokens, targets = uneven_rows()
    model, optimizer = build(clip_norm=1.0)
    step(model, optimizer, [MicroBatch(tokens, targets, None)], clip_norm=1.0)  # so that AdamW has a state
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])

    poison = model.embedding.weight.register_hook(lambda gradient: gradient * bad)
    result = step(model, optimizer, [MicroBatch(tokens, targets, None)], clip_norm=1.0)
    assert result.skipped
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    for index, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(entry[key], state[index][key]) for key in entry)
    assert all(p.grad is None for p in model.parameters())

    poison.remove()
    assert not step(model, optimizer, [MicroBatch(tokens, targets, None)], clip_norm=1.0).skipped


def test_stop_comes_back():
    tokens, targets = uneven_rows()
    model, optimizer = build()
    assert not step(model, optimizer, [MicroBatch(tokens, targets, None)]).stop
    assert step(model, optimizer, [MicroBatch(tokens, targets, None)], stop=True).stop


def test_bf16_keeps_fp32_weights_and_comes_close():
    tokens, targets = uneven_rows()
    (a, a_optimizer), (b, b_optimizer) = build(), build()
    exact = step(a, a_optimizer, [MicroBatch(tokens, targets, None)])
    rough = step(b, b_optimizer, [MicroBatch(tokens, targets, None)], precision="bf16")
    assert rough.loss != exact.loss
    assert rough.loss == pytest.approx(exact.loss, rel=1e-2)
    assert all(p.dtype == torch.float32 for p in b.parameters())


def test_groups_without_decay_and_with_their_own_rate():
    model, optimizer = build(weight_decay=0.5)
    by_name = {group["name"]: group for group in optimizer.param_groups}
    assert by_name["matrices"]["weight_decay"] == 0.5
    assert by_name["no_decay"]["weight_decay"] == by_name["temperature"]["weight_decay"] == 0.0
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    set_learning_rate(optimizer, 0.002)
    assert by_name["matrices"]["lr"] == 0.002
    assert by_name["temperature"]["lr"] == pytest.approx(0.002 * CONFIG.temperature_lr_scale)
