"""Models with performer attention: the redraw schedule, decoding in constant memory, conversion, saving, refusals."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from clearhead.attention.spec import Performer
from clearhead.errors import UserError
from clearhead.layers.performer import PerformerFeatures
from clearhead.models.config import ModelConfig
from clearhead.models.convert import convert
from clearhead.models.decoder import Decoder
from clearhead.models.generate import generate
from clearhead.models.io import load_model, save_model
from clearhead.models.make import build_model
from clearhead.signal.inspection import predict

CONFIG = ModelConfig(
    vocab_size=31, layers=2, width=24, heads=4, kv_heads=2, context=64, attention="performer:features=20,redraw=3"
)
TOKENS = torch.randint(0, 31, (3, 20), generator=torch.Generator().manual_seed(0))


def projections(model):
    return [m.projection.clone() for m in model.modules() if isinstance(m, PerformerFeatures)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_new_features_every_few_training_forwards():
    model = build_model(CONFIG)
    first = projections(model)
    assert not torch.equal(first[0], first[1])  # layers draw their own
    seen = []
    for _ in range(7):
        model(TOKENS)
        seen.append(projections(model))
    assert [same(seen[i], seen[i - 1]) for i in range(1, 7)] == [True, True, False, True, True, False]
    assert same(seen[0], first)
    assert not same(seen[6], seen[3])
    model.eval()
    for _ in range(4):
        model(TOKENS)
    assert same(projections(model), seen[6])


def test_frozen_and_never():
    model = build_model(CONFIG)
    never = build_model(dataclasses.replace(CONFIG, attention="performer:features=20,redraw=0"))
    for module in model.modules():
        if isinstance(module, PerformerFeatures):
            module.freeze()
    first, still = projections(model), projections(never)
    for _ in range(8):
        model(TOKENS)
        never(TOKENS)
    assert same(first, projections(model))
    assert same(still, projections(never))


def test_processes_and_resumed_runs_draw_the_same():
    """Whatever the global generator is, and whatever data they see."""
    a, b = build_model(CONFIG), build_model(CONFIG, seed=5)
    for step in range(4):
        a(TOKENS)
        torch.manual_seed(step)
        b(TOKENS.flip(0))
    assert same(projections(a), projections(b))
    resumed = build_model(CONFIG)
    resumed.load_state_dict(copy.deepcopy(a.state_dict()))
    for _ in range(3):
        a(TOKENS)
        resumed(TOKENS)
    assert same(projections(a), projections(resumed))
    assert torch.equal(a(TOKENS), resumed(TOKENS))


def test_a_redraw_between_forward_and_backward_changes_no_gradient():
    model = build_model(CONFIG)
    first, second = model(TOKENS), [model(TOKENS) for _ in range(3)][-1]
    assert not torch.equal(first, second)
    first.square().sum().backward()
    late = [p.grad.clone() for p in model.parameters()]
    fresh = build_model(CONFIG)
    fresh(TOKENS).square().sum().backward()
    for mine, true in zip(late, fresh.parameters()):
        torch.testing.assert_close(mine, true.grad)


def test_compiled_training_redraws_too():
    model = build_model(CONFIG)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(5):
        torch.testing.assert_close(compiled(TOKENS), twin(TOKENS))
    assert same(projections(model), projections(twin))
    assert not same(projections(model), projections(build_model(CONFIG)))


@pytest.mark.parametrize("attention", ["performer:features=20", "performer:kernel=hyperbolic,features=8+laser"])
def test_decoding_equals_the_forward_in_constant_memory(attention):
    model = Decoder(dataclasses.replace(CONFIG, attention=attention)).double().eval()
    with torch.no_grad():
        full, state = model(TOKENS), model.new_state(3, 20)
        size = sum(cache.bytes for cache in state.caches)
        parts = [model(part, state=state) for part in TOKENS.split([7, 1, 12], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-10, atol=1e-10)
        assert sum(cache.bytes for cache in state.caches) == size
        assert state.lengths.tolist() == [20] * 3
        state.reorder(torch.tensor([2, 0, 1]))
        again = model(TOKENS[[2, 0, 1], :1], state=state)
        whole = model(torch.cat([TOKENS, TOKENS[:, :1]], dim=1))[:, -1:]
        torch.testing.assert_close(again, whole[[2, 0, 1]], rtol=1e-10, atol=1e-10)
    drawn = generate(model, TOKENS, max_new_tokens=6, temperature=0.0)
    for end in range(20, 26):
        assert torch.equal(model(drawn[:, :end])[:, -1].argmax(-1), drawn[:, end])


@pytest.mark.parametrize("architecture", ["encoder", "seq2seq"])
def test_other_architectures_train(architecture):
    model = build_model(dataclasses.replace(CONFIG, architecture=architecture, attention="performer:relu,features=20"))
    out = model(TOKENS) if architecture == "encoder" else model(TOKENS, TOKENS)
    (out[0] if isinstance(out, tuple) else out).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_softmax_model_converts_and_is_close_where_norms_are_small():
    softmax = build_model(dataclasses.replace(CONFIG, attention="softmax"), seed=3).eval()
    made = convert(softmax, "performer:features=512")
    assert isinstance(made.config.spec.weights, Performer)
    assert not made.training
    old = softmax.state_dict()
    new = made.state_dict()
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert all(".features." in name for name in new.keys() - old.keys())
    # First weights make small queries and keys; a trained model's are not, and it must be trained on.
    assert (made(TOKENS) - softmax(TOKENS)).norm() < 0.02 * softmax(TOKENS).norm()
    back = convert(made, "softmax")
    assert torch.equal(back(TOKENS), softmax(TOKENS))
    made.train()
    made(TOKENS).square().mean().backward()
    with pytest.raises(UserError, match=r"temperatures.* do not fit"):
        convert(softmax, "performer+selective", temperature_on="value")


def test_saved_with_its_projection(tmp_path):
    model = build_model(CONFIG)
    for _ in range(5):
        model(TOKENS)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert same(projections(model), projections(loaded))
    assert torch.equal(loaded(TOKENS), model.eval()(TOKENS))
    loaded.train()
    loaded(TOKENS), loaded(TOKENS)
    assert not same(projections(model), projections(loaded))  # the count went on: 5, 6, 7 forwards


def test_cost_does_not_depend_on_the_context():
    model = build_model(CONFIG)
    assert model.flops_per_token(64) == model.flops_per_token(65536)
    softmax = build_model(dataclasses.replace(CONFIG, attention="softmax"))
    assert model.count_parameters() == softmax.count_parameters()
    # Per layer and head: 4 m d for the features of q and k, 4 r d for adding and reading; m = r = 20, d = 6.
    layers = model.flops_per_token(64) - (softmax.flops_per_token(1) - 3 * 4 * 4 * 6 * 2)
    assert layers == pytest.approx(3 * 2 * 4 * (4 * 20 * 6 + 4 * 20 * 6))
    hyperbolic = build_model(dataclasses.replace(CONFIG, attention="performer:hyperbolic,features=20"))
    assert hyperbolic.flops_per_token(64) > model.flops_per_token(64)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(position="alibi"), "position=alibi with performer"),
        (dict(position="t5"), "position=t5 with performer"),
        (dict(attention_dropout=0.1), "attention_dropout with performer"),
        (dict(attention="performer+selective"), "set temperature_on=value"),
        (dict(attention="performer+window:5"), "never makes a score"),
    ],
)
def test_configs_that_cannot_be(options, reason):
    with pytest.raises(UserError, match=reason):
        dataclasses.replace(CONFIG, **options)


def test_no_prediction_of_its_signal():
    with pytest.raises(UserError, match="no theory for the weights 'performer'; measure the model instead"):
        predict(CONFIG)
