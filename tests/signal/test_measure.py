"""`measure` against plain recomputation, and that it leaves no trace of itself."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clearhead.models.config import PRESETS
from clearhead.models.make import build_model
from clearhead.signal.measurement import measure
from clearhead.signal.trace import Trace
from tests.anatomy.hf_models import batch_for, build
from tests.anatomy.test_find import Homemade, VisionTransformer

TINY = dataclasses.replace(PRESETS["tiny"], width=32, vocab_size=97)


def plain_moments(x: Tensor, valid: Tensor) -> tuple[float, float, float]:
    """Mean, variance, covariance by the definitions, with loops over sequences and pairs."""
    x = x.detach().double()
    kept = torch.cat([x[i][valid[i]].flatten() for i in range(len(x))])
    mean = kept.mean()
    variance = ((kept - mean) ** 2).mean()
    products: list[Tensor] = []
    for i in range(len(x)):
        rows = x[i][valid[i]] - mean
        for t in range(len(rows)):
            for s in range(len(rows)):
                if s != t:
                    products.append(rows[t] * rows[s])
    return float(mean), float(variance), float(torch.cat(products).mean())


class Stream:
    """Activations of `Homemade` at every place, with autograd alive, by writing the model out."""

    def __init__(self, model: Any, ids: Tensor, post: bool) -> None:
        self.at: dict[str, Tensor] = {}
        x = self._keep("embedding", model.token(ids))
        for index, layer in enumerate(model.layers):
            for part, branch, norm in (
                ("attention", layer.mixer, layer.norm_a),
                ("feed_forward", layer.net, layer.norm_b),
            ):
                name = f"{index}.{part}"
                self.at[f"{name}.input"] = x
                read = x if post else self._keep(f"{name}.normed", norm(x))
                x = self._keep(f"{name}.sum", x + self._keep(f"{name}.branch", branch(read)))
                x = self._keep("after", norm(x)) if post else x
        self.at["output"] = x
        self.logits = self._keep("logits", model.lm_head(self._keep("normed", model.last_norm(x))))

    def _keep(self, name: str, x: Tensor) -> Tensor:
        x.retain_grad()
        self.at[name] = x
        return x


def next_token(logits: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
    both = valid[:, 1:] & valid[:, :-1]
    return F.cross_entropy(logits[:, :-1][both], ids[:, 1:][both])


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_moments_and_gradients_equal_plain_recomputation(post: bool, padded: bool) -> None:
    model = Homemade(post)
    ids = torch.randint(0, 50, (3, 7))
    valid = torch.ones(3, 7, dtype=torch.bool)
    if padded:
        valid[0, 5:] = False
        valid[2, :4] = False
    written = Stream(model, ids, post)
    loss = next_token(written.logits, ids, valid)
    loss.backward()
    wanted_gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    def objective(output: Tensor, batch: Tensor) -> Tensor:
        return next_token(output, batch, valid)

    trace = measure(model, ids, loss=objective, valid=valid)
    assert trace.facts["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert trace.facts["valid_tokens"] == int(valid.sum())
    placed = [tap for tap in trace]
    assert len(placed) == (1 + 3 * 2 * 3 + 3)
    for tap in placed:
        name = tap.name.removeprefix("decoder.")
        x = written.at[name]
        mean, variance, covariance = plain_moments(x, valid)
        assert tap.forward is not None
        assert tap.forward.mean == pytest.approx(mean, rel=1e-4, abs=1e-6), name
        assert tap.forward.variance == pytest.approx(variance, rel=1e-4), name
        assert tap.forward.covariance == pytest.approx(covariance, rel=1e-3, abs=1e-6 * variance), name
        g = x.grad
        assert g is not None
        rows = [g[i][valid[i]].double() for i in range(len(g))]
        square = torch.cat([r.flatten() for r in rows]).square().mean()
        pairs = sum(len(r) * (len(r) - 1) for r in rows) * g.shape[2]
        cross = sum((r.sum(0).square() - r.square().sum(0)).sum() for r in rows) / pairs
        assert tap.backward is not None
        assert tap.backward.variance == pytest.approx(float(square), rel=1e-4), name
        assert tap.backward.covariance == pytest.approx(float(cross), rel=2e-3, abs=1e-5 * float(square)), name
    for index in range(3):
        tap = trace[f"decoder.{index}.attention.branch"]
        for role, leaf in (("query", "wq"), ("key", "wk"), ("value", "wv"), ("output", "wo")):
            norm = wanted_gradients[f"layers.{index}.mixer.{leaf}.weight"].norm()
            assert tap.matrix_gradients[role] == pytest.approx(float(norm), rel=1e-4)
        total = sum(value**2 for value in tap.matrix_gradients.values()) ** 0.5
        assert tap.parameter_gradient == pytest.approx(total)
        tap = trace[f"decoder.{index}.feed_forward.branch"]
        norm = wanted_gradients[f"layers.{index}.net.2.weight"].norm()
        assert tap.matrix_gradients["down"] == pytest.approx(float(norm), rel=1e-4)


def test_gradients_of_the_parts_of_a_fused_matrix() -> None:
    model = build("gpt_neox").eval()
    batch = batch_for("gpt_neox") | {"labels": batch_for("gpt_neox")["input_ids"]}
    trace = measure(model, batch)
    assert trace.facts["loss_kind"] == "output"
    weight = model.gpt_neox.layers[1].attention.query_key_value.weight  # type: ignore[union-attr]
    (gradient,) = torch.autograd.grad(model(**batch).loss, [weight])
    parts = gradient.reshape(4, 3, 8, 32)
    found = trace["decoder.1.attention.branch"].matrix_gradients
    for index, role in enumerate(("query", "key", "value")):
        assert found[role] == pytest.approx(float(parts[:, index].norm()), rel=1e-4)


def test_effective_rank_of_the_stream() -> None:
    model = Homemade()
    ids = torch.randint(0, 50, (2, 9))
    trace = measure(model, ids)
    wanted = []
    for x in Stream(model, ids, post=False).at["output"].detach().double():
        values = torch.linalg.svdvals(x)
        shares = values / values.sum()
        wanted.append(float((-(shares * shares.log()).sum()).exp()))
    assert trace["decoder.output"].effective_rank == pytest.approx(np.mean(wanted), rel=1e-5)
    same = measure(model, torch.full((2, 9), 3))  # no positions: equal tokens stay equal
    assert same["decoder.output"].effective_rank == pytest.approx(1.0, abs=1e-3)
    assert same["decoder.output"].forward.correlation == pytest.approx(1.0, abs=1e-4)  # type: ignore[union-attr]


def test_tiny_and_huge_numbers_do_not_leave_the_range() -> None:
    """A gradient of 1e-26, as a deep Post-LN has it, and a stream of 1e20: their squares are out of float32's range."""
    model = Homemade()
    ids = torch.randint(0, 50, (2, 6))
    usual = measure(model, ids, loss=lambda out, _: out.square().sum())
    faint = measure(model, ids, loss=lambda out, _: out.square().sum() * 1e-25)
    for tap in usual:
        assert tap.backward is not None
        assert faint[tap.name].backward.variance == pytest.approx(tap.backward.variance * 1e-50, rel=1e-3)  # type: ignore[union-attr]
        for role, norm in tap.matrix_gradients.items():
            assert faint[tap.name].matrix_gradients[role] == pytest.approx(norm * 1e-25, rel=1e-3)
    with torch.no_grad():
        model.token.weight.mul_(1e20)
    assert measure(model, ids, backward=False)["decoder.embedding"].forward.variance == pytest.approx(  # type: ignore[union-attr]
        usual["decoder.embedding"].forward.variance * 1e40,  # type: ignore[union-attr]
        rel=1e-3,
    )


# ---- leaving no trace ----


class Moody(Homemade):
    """Changes a buffer, swaps another, draws from every generator; fails when told to."""

    def __init__(self, failure: BaseException | None = None) -> None:
        super().__init__()
        self.failure = failure
        self.drop = nn.Dropout(0.3)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, ids: Tensor) -> Tensor:
        self.count += 1
        self.mean = self.mean + 1.0
        random.random()
        np.random.rand()
        x = self.drop(self.token(ids))
        for index, layer in enumerate(self.layers):
            if index == 1 and self.failure is not None:
                raise self.failure
            x = layer(x)
        return self.lm_head(self.last_norm(x))


def fingerprint(model: nn.Module) -> dict[str, Any]:
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
    )
    return {
        "values": {
            name: (id(t), t.detach().clone()) for name, t in (*model.named_parameters(), *model.named_buffers())
        },
        "gradients": {n: (id(p.grad), p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None},
        "wanted": {n: p.requires_grad for n, p in model.named_parameters()},
        "leaf hooks": {n: p._backward_hooks for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: [len(getattr(m, h)) for h in hooks] for n, m in model.named_modules()},
        "flags": {n: getattr(m, "gradient_checkpointing", None) for n, m in model.named_modules()},
        "generators": (torch.get_rng_state(), random.getstate(), str(np.random.get_state())),
        "config": str(getattr(model, "config", "")),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, tuple | list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def prepared(model: nn.Module, ids: Tensor) -> nn.Module:
    """Some parameters carry a gradient, some are frozen, one module is in eval mode, and a user's hook is there."""
    out = model(ids)
    (out.logits if hasattr(out, "logits") else out).sum().backward()
    for index, parameter in enumerate(model.parameters()):
        if index % 3 == 0:
            parameter.grad = None
        if index % 5 == 0:
            parameter.requires_grad_(False)
    for draw in (random.random, np.random.rand, lambda: torch.rand(1)) * 5:
        draw()  # away from the state that a seed of 0 and one forward pass lead to
    next(iter(model.children())).eval()
    next(iter(model.children())).register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("failure", [None, RuntimeError("broken"), KeyboardInterrupt()])
def test_the_model_is_left_as_it_was(failure: BaseException | None) -> None:
    ids = torch.randint(0, 50, (2, 6))
    model = prepared(Moody(), ids)
    model.failure = failure  # type: ignore[assignment]
    before = fingerprint(model)
    if failure is None:
        trace = measure(model, ids)
        assert all(tap.backward is not None for tap in trace)  # frozen parameters do not stop the gradient
    else:
        with pytest.raises(type(failure)):
            measure(model, ids)
    assert_equal(before, fingerprint(model))
    model.failure = None  # type: ignore[assignment]
    out = model(ids)  # nothing watches any more
    assert out.shape == (2, 6, 50)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart"])
def test_hugging_face_models_are_left_as_they_were(name: str) -> None:
    model = build(name)
    # The reentrant kind of checkpointing cannot be differentiated in part, so it has to be off meanwhile.
    model.gradient_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
    batch = batch_for(name)
    before = fingerprint(model)
    first = measure(model, batch)
    assert_equal(before, fingerprint(model))
    assert not any("ran 2 times" in note for note in first.notes)
    assert same(first, measure(model, batch))


def test_layers_that_run_again_in_the_backward_pass_are_seen_once() -> None:
    from torch.utils.checkpoint import checkpoint

    class Frugal(Homemade):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.token(ids)
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)  # type: ignore[assignment]
            return self.lm_head(self.last_norm(x))

    ids = torch.randint(0, 50, (2, 6))
    frugal, usual = Frugal(), Homemade()
    usual.load_state_dict(frugal.state_dict())
    loss = lambda out, _: out.square().sum()
    found, wanted = measure(frugal, ids, loss=loss), measure(usual, ids, loss=loss)
    assert found.notes == wanted.notes
    for tap in found:
        assert tap.forward == wanted[tap.name].forward
        assert tap.matrix_gradients == pytest.approx(dict(wanted[tap.name].matrix_gradients), rel=1e-5)


def same(a: Trace, b: Trace) -> bool:
    return [dataclasses.asdict(tap) for tap in a] == [dataclasses.asdict(tap) for tap in b]


def test_the_same_call_gives_the_same_trace_and_another_seed_another() -> None:
    model = build_model(dataclasses.replace(TINY, dropout=0.2))
    ids = torch.randint(0, 97, (2, 16))
    first = measure(model, ids, rows=4)
    torch.rand(3)
    assert same(first, measure(model, ids, rows=4))
    assert not same(first, measure(model, ids, rows=4, seed=1))
    model.eval()
    assert not same(first, measure(model, ids, rows=4))  # the mode is the caller's choice, and it matters


def test_a_user_can_be_in_no_grad_or_inference_mode() -> None:
    model, ids = Homemade(), torch.randint(0, 50, (2, 6))
    wanted = measure(model, ids)
    with torch.no_grad():
        assert same(measure(model, ids), wanted)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert same(measure(model, ids), wanted)


def test_forward_only() -> None:
    model, ids = Homemade(), torch.randint(0, 50, (2, 6))
    whole, half = measure(model, ids), measure(model, ids, backward=False)
    for tap in half:
        assert tap.backward is None
        assert tap.parameter_gradient is None
        assert tap.forward == whole[tap.name].forward
        assert tap.attention == whole[tap.name].attention
    assert half.facts["loss_kind"] is None


def test_only_the_taps_that_are_asked_for() -> None:
    trace = measure(Homemade(), torch.randint(0, 50, (2, 6)), taps=("input", "normed"))
    assert {tap.place for tap in trace} == {"input", "normed"}
    assert all(tap.effective_rank is None for tap in trace)
    assert all(tap.backward is not None for tap in trace)


# ---- kinds of model and batch ----


def test_every_kind_of_our_models() -> None:
    ids = torch.randint(0, 97, (2, 9))
    targets = torch.where(torch.arange(9) % 3 == 0, ids, -100)
    encoder = measure(
        build_model(dataclasses.replace(TINY, architecture="encoder")), {"tokens": ids, "targets": targets}
    )
    assert encoder.facts["loss_kind"] == "targets"
    assert len(encoder.stream("encoder")) == 5
    source_valid = torch.ones(2, 7, dtype=torch.bool)
    source_valid[0, 4:] = False
    batch = {"source": ids[:, :7], "source_valid": source_valid, "tokens": ids, "targets": ids}
    both = measure(build_model(dataclasses.replace(TINY, architecture="seq2seq")), batch)
    assert both.facts["stacks"] == {
        "encoder": {"tokens": 7, "valid_tokens": 11},
        "decoder": {"tokens": 9, "valid_tokens": 18},
    }
    assert both["decoder.1.cross_attention.branch"].attention is not None
    assert all(tap.backward is not None for tap in both)
    assert measure(build_model(TINY), ids).facts["loss_kind"] == "next token"


def test_pixels_and_a_head_without_tokens() -> None:
    trace = measure(VisionTransformer(), torch.randn(2, 3, 16, 16))
    assert trace.facts["tokens"] == 17
    assert trace.facts["loss_kind"] == "random"
    assert "logits" not in trace
    assert any("logits" in note for note in trace.notes)
    assert trace["encoder.1.attention.branch"].attention is not None


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_tokens_may_come_first(mode: str) -> None:
    """torch's layers by default take [tokens, batch, width]; both layouts must give the same trace."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    first = nn.TransformerEncoder(layer, 2)
    other = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0), 2)
    other.load_state_dict(first.state_dict())
    for model in (first, other):
        getattr(model, mode)()
    x = torch.randn(3, 7, 32)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    a = measure(first, {"src": x, "src_key_padding_mask": padding})
    b = measure(other, {"src": x.transpose(0, 1), "src_key_padding_mask": padding})
    assert a.facts["valid_tokens"] == b.facts["valid_tokens"] == 18
    forward = measure(first, {"src": x, "src_key_padding_mask": padding}, backward=False)
    for tap in a:
        assert tap.forward is not None
        assert tap.forward.variance == pytest.approx(b[tap.name].forward.variance, rel=1e-4)  # type: ignore[union-attr]
        assert tap.forward.covariance == pytest.approx(b[tap.name].forward.covariance, rel=1e-3, abs=1e-5)  # type: ignore[union-attr]
        assert forward[tap.name].forward == tap.forward  # no fused path around the hooks without a gradient
    stats = a["encoder.0.attention.branch"].attention
    assert stats is not None
    assert stats.entropy == pytest.approx(b["encoder.0.attention.branch"].attention.entropy, rel=1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["t5", "whisper", "electra", "vit", "falcon", "opt-post"])
def test_hugging_face_models_of_every_shape(name: str) -> None:
    trace = measure(build(name), batch_for(name))
    places = {tap.place for tap in trace}
    assert {"input", "branch", "output", "embedding"} <= places
    assert all(tap.forward is not None and tap.backward is not None for tap in trace)
    attentions = [tap for tap in trace if tap.part.endswith("attention") and tap.place == "branch"]
    assert attentions
    assert all(tap.attention is not None for tap in attentions)
    assert all(tap.parameter_gradient is not None and tap.parameter_gradient > 0 for tap in trace.at("branch"))
    assert Trace.from_dict(trace.to_dict()) == trace


# ---- precision ----


def test_half_precision_is_measured_in_float32() -> None:
    model = build_model(TINY).eval()
    ids = torch.randint(0, 97, (2, 16))
    wanted = measure(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        cast = measure(model, ids)
    half = measure(model.to(torch.bfloat16), ids)
    assert half.facts["dtype"] == "bfloat16"
    for trace in (cast, half):
        for tap in trace:
            assert tap.forward is not None
            assert tap.forward.variance == pytest.approx(wanted[tap.name].forward.variance, rel=0.05), tap.name  # type: ignore[union-attr]
            assert tap.backward is not None
        stats = trace["decoder.1.attention.branch"].attention
        assert stats is not None
        assert stats.entropy == pytest.approx(wanted["decoder.1.attention.branch"].attention.entropy, rel=0.02)  # type: ignore[union-attr]


def test_float64_is_measured_in_float64() -> None:
    model = Homemade().double()
    ids = torch.randint(0, 50, (2, 6))
    written = Stream(model, ids, post=False)
    mean, variance, covariance = plain_moments(written.at["output"], torch.ones(2, 6, dtype=torch.bool))
    found = measure(model, ids)["decoder.output"].forward
    assert found is not None
    assert (found.mean, found.variance, found.covariance) == pytest.approx((mean, variance, covariance), rel=1e-12)


def test_a_compiled_model_is_measured_eagerly() -> None:
    model = build_model(TINY)
    ids = torch.randint(0, 97, (2, 8))
    assert same(measure(torch.compile(model), ids), measure(model, ids))  # type: ignore[arg-type]
    wanted = measure(model, ids)
    model.compile(backend="aot_eager")
    assert same(measure(model, ids), wanted)
