"""Attention statistics against the dense attention matrix, for every way in which attention is run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from clearhead.attention.attend import attend
from clearhead.attention.observe import WATCHERS, watching
from clearhead.attention.terms import Rows
from clearhead.models.config import PRESETS
from clearhead.models.make import build_model
from clearhead.signal.attention_probe import Sample
from clearhead.signal.measurement import measure
from clearhead.signal.trace import AttentionStats
from tests.anatomy.hf_models import batch_for, build
from tests.anatomy.test_find import Homemade

TINY = dataclasses.replace(PRESETS["tiny"], width=32, vocab_size=97, heads=4)


def dense_stats(scores_hnm: Tensor, visible_hnm: Tensor, rows_hn: Tensor, weights_hnm: Tensor | None = None) -> Any:
    """By the definitions of `AttentionStats`, row by row, in float64."""
    rows: list[tuple[float, ...]] = []
    ranks = []
    for h in range(scores_hnm.shape[0]):
        kept = []
        for n in range(scores_hnm.shape[1]):
            seen = visible_hnm[h, n]
            if not rows_hn[h, n] or not seen.any():
                continue
            x = scores_hnm[h, n][seen].double()
            a = x.softmax(-1)
            jacobian = torch.diag(a) - torch.outer(a, a)
            w = a if weights_hnm is None else weights_hnm[h, n][seen].double()
            share = w.abs() / w.abs().sum().clamp_min(1e-30)
            rows.append(
                (
                    float(((x - x.mean()) ** 2).mean()),
                    float(-torch.special.xlogy(share, share).sum()),
                    float(torch.tensor(float(seen.sum())).log()),
                    float(w.max()),
                    float((w**2).sum()),
                    float((jacobian**2).sum()),
                )
            )
            full = torch.zeros(scores_hnm.shape[2], dtype=torch.float64)
            full[seen] = w
            kept.append(full)
        if kept:
            values = torch.linalg.svdvals(torch.stack(kept))
            share = values / values.sum()
            ranks.append(float((-torch.special.xlogy(share, share).sum()).exp()))
    means = torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist()
    return AttentionStats(*means, effective_rank=sum(ranks) / len(ranks))


def assert_close(found: AttentionStats | None, wanted: AttentionStats, rel: float = 1e-4) -> None:
    assert found is not None
    for name, value in dataclasses.asdict(wanted).items():
        assert getattr(found, name) == pytest.approx(value, rel=rel, abs=1e-6), name


def by_head(x: Tensor, sequence: list[int]) -> Tensor:
    """[h, ...]: each head's own sequence of [b, h, ...]."""
    return torch.stack([x[i, h] for h, i in enumerate(sequence)])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 2},
        {"position": "alibi"},
        {"attention": "softmax+window:3"},
        {"attention": "laser"},
        {"attention": "self_adjust"},
        {"attention": "self_adjust:form=product"},
        {"attention": "softmax+selective"},
        {"qk_norm": True, "norm_placement": "post"},
        {"architecture": "encoder", "position": "t5"},
        {"position": "fire"},
        {"position": "kerple"},
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
def test_our_models(changes: dict[str, Any], padded: bool) -> None:
    """The weights come from `attend`'s own extras, the scores from queries and keys seen on the way."""
    model = build_model(dataclasses.replace(TINY, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)  # so that attention is far from uniform
    ids = torch.randint(0, 97, (4, 9))
    valid = torch.ones(4, 9, dtype=torch.bool)
    if padded:
        valid[0, 6:] = False
        valid[2, :3] = False
    trace = measure(model, {"tokens": ids, "valid": valid})
    calls: list[Any] = []
    with watching(calls.append), torch.no_grad():
        model(ids, valid=valid)
    order = valid.sum(1).argsort(descending=True, stable=True).tolist()
    for layer, call in enumerate(calls):
        keys = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], dim=1)
        scores = call.q @ keys.mT * call.scale
        if call.bias is not None:
            everyone = torch.arange(9)
            scores = scores + call.bias.block(Rows(everyone, everyone, 0))
        seen = call.mask.dense_tensor(9, 9, ids.device)
        visible = torch.ones_like(scores, dtype=torch.bool) if seen is None else seen.expand(scores.shape)
        spec = call.spec.text.removesuffix("+selective")  # the queries of the call have their temperature already
        extras = attend(
            call.q, call.k, call.v, spec, mask=call.mask, bias=call.bias, scale=call.scale, want=("weights",)
        ).extras
        stats = dense_stats(
            by_head(scores, order),
            by_head(visible, order),
            valid[order],
            by_head(extras["weights"], order),
        )
        stack = trace.taps[0].stack
        assert_close(trace[f"{stack}.{layer}.attention.branch"].attention, stats, rel=2e-4)
    assert not WATCHERS


@pytest.mark.parametrize("position", ["t5", "kerple", "fire", "alibi"])
def test_positions_on_scores_are_right_where_the_sampled_rows_have_gaps(position: str) -> None:
    model = build_model(dataclasses.replace(TINY, position=position, layers=1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    ids = torch.randint(0, 97, (1, 32))
    calls: list[Any] = []
    with watching(calls.append), torch.no_grad():
        model(ids)
    (call,) = calls
    _, row_r, _ = Sample(8, 0).draw(1, 4, 32, None, ids.device)
    assert (row_r.diff() > 1).any()
    everyone = torch.arange(32)
    scores = call.q @ call.k.mT * call.scale + call.bias.block(Rows(everyone, everyone, 0))
    sampled = torch.zeros(4, 32, dtype=torch.bool)
    sampled[:, row_r] = True
    stats = dense_stats(scores[0], torch.ones(32, 32, dtype=torch.bool).tril().expand(4, -1, -1), sampled)
    found = measure(model, ids, rows=8)["decoder.0.attention.branch"].attention
    assert_close(found, stats, rel=2e-4)


def test_weights_of_our_softmax_sum_to_one_and_bound_each_other() -> None:
    trace = measure(build_model(TINY), torch.randint(0, 97, (4, 32)), rows=8)
    for tap in trace:
        if tap.attention is not None:
            stats = tap.attention
            assert 0.0 <= stats.entropy <= stats.uniform_entropy + 1e-6
            assert stats.participation <= stats.largest_weight <= 1.0
            assert stats.effective_rank is not None
            assert 1.0 <= stats.effective_rank <= 8.0 + 1e-6


def eager_attentions(name: str, batch: dict[str, Tensor]) -> tuple[nn.Module, Any]:
    model = build(name).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 and "emb" not in key and "wte" not in key:
                parameter.mul_(12.0)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    return model, attentions


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_hugging_face_models(name: str, implementation: str) -> None:
    """The eager weights, dense, from the model itself. Scores up to a constant of each row are their logarithms."""
    batch = batch_for(name)
    model, attentions = eager_attentions(name, batch)
    model.set_attn_implementation(implementation)  # type: ignore[operator]
    trace = measure(model, batch)
    valid = batch["attention_mask"].bool()
    order = [0, 1, 2, 0]
    for layer, weights in enumerate(attentions):
        assert float(weights.max()) > 0.3  # far from uniform
        visible = valid[:, None, None, :].expand(weights.shape)
        if name != "bert":
            visible = visible & torch.ones(12, 12, dtype=torch.bool).tril()
        scores = weights.double().clamp_min(1e-300).log()
        stats = dense_stats(by_head(scores, order), by_head(visible, order), valid[order])
        stack = trace.taps[0].stack
        assert_close(trace[f"{stack}.{layer}.attention.branch"].attention, stats, rel=2e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_fused_kernels_own_causal_flag(name: str) -> None:
    """Without padding no mask is handed over, only `is_causal`."""
    model, batch = build(name).eval(), {"input_ids": batch_for(name)["input_ids"]}
    fused = measure(model, batch)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    written = measure(model, batch)
    for tap in fused:
        if tap.attention is not None:
            assert_close(tap.attention, written[tap.name].attention, rel=1e-4)  # type: ignore[arg-type]
            assert tap.attention.uniform_entropy < 2.0  # half of the 12 keys, not all


@pytest.mark.parametrize("name", ["t5", "gemma2", "bloom", "gpt_neo"])
def test_fused_and_written_out_attention_agree(name: str) -> None:
    model, batch = build(name).eval(), batch_for(name)
    traces = []
    for implementation in ("sdpa", "eager"):
        try:
            model.set_attn_implementation(implementation)  # type: ignore[operator]
        except ValueError:
            continue  # the model has only the other
        traces.append(measure(model, batch))
    for trace in traces:
        for tap in trace:
            if tap.attention is not None:
                assert_close(tap.attention, traces[0][tap.name].attention, rel=1e-3)  # type: ignore[arg-type]


def test_a_hand_written_softmax_with_a_finite_mask() -> None:
    model = Homemade(causal=True).eval()
    ids = torch.randint(0, 50, (4, 7))
    stats = measure(model, ids)["decoder.0.attention.branch"].attention
    layer: Any = model.layers[0]
    x = layer.norm_a(model.token(ids))
    q, k = (w(x).unflatten(-1, (4, -1)).transpose(1, 2) for w in (layer.mixer.wq, layer.mixer.wk))
    scores = (q @ k.mT * 8**-0.5).detach()
    visible = torch.ones(4, 7, 7, dtype=torch.bool).tril()
    assert_close(stats, dense_stats(by_head(scores, [0, 1, 2, 3]), visible, torch.ones(4, 7, dtype=torch.bool)))


@pytest.mark.parametrize("need_weights", [False, True])
def test_torch_multi_head_attention_with_masks(need_weights: bool) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
            self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
            self.mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

        def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
            hide = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            h = self.norm1(x)
            h, _ = self.attn(h, h, h, attn_mask=hide, key_padding_mask=padding, need_weights=need_weights)
            x = x + h
            return x + self.mlp(self.norm2(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
            for layer in self.layers:
                x = layer(x, padding)
            return x

    model = Model().eval()
    x = torch.randn(4, 6, 32) * 3.0
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        model.layers[0].attn.in_proj_weight.mul_(3.0)  # type: ignore[union-attr]
    trace = measure(model, (x, padding), valid=~padding)
    layer: Any = model.layers[0]
    q, k, _ = (layer.norm1(x) @ layer.attn.in_proj_weight.mT + layer.attn.in_proj_bias).chunk(3, dim=-1)
    q, k = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k))
    scores = (q @ k.mT * 8**-0.5).detach()
    visible = torch.ones(6, 6, dtype=torch.bool).tril() & ~padding[:, None, None, :]
    order = [0, 2, 3, 1]
    stats = dense_stats(by_head(scores, order), by_head(visible.expand(scores.shape), order), (~padding)[order])
    assert_close(trace["decoder.0.attention.branch"].attention, stats)


def test_masks_of_true_and_false_hide_where_true_in_torch() -> None:
    """`nn.MultiheadAttention` turns them into numbers; whoever calls the function itself need not."""
    from clearhead.signal.attention_probe import AttentionProbe

    attention = nn.MultiheadAttention(32, 4).eval()
    x = torch.randn(5, 2, 32)
    hide, padding = torch.ones(5, 5, dtype=torch.bool).triu(1), torch.zeros(2, 5, dtype=torch.bool)
    padding[:, 4] = True
    probe = AttentionProbe(5, 0)
    probe.running.append(("here", None))
    with probe.looking(), torch.no_grad():
        nn.functional.multi_head_attention_forward(
            x, x, x, 32, 4, attention.in_proj_weight, attention.in_proj_bias, None, None, False, 0.0,
            attention.out_proj.weight, attention.out_proj.bias, attn_mask=hide, key_padding_mask=padding,
        )  # fmt: skip
    seen = torch.tensor([1.0, 2.0, 3.0, 4.0, 4.0])
    assert probe.stats()["here"].uniform_entropy == pytest.approx(float(seen.log().mean()), rel=1e-5)


def test_the_sample_is_at_most_rows_and_the_same_in_every_layer() -> None:
    from clearhead.signal.attention_probe import AttentionProbe, Sample

    sample = Sample(5, seed=0)
    valid = torch.ones(3, 40, dtype=torch.bool)
    valid[0, 8:] = False
    sequence, rows, counts = sample.draw(3, 4, 40, valid, torch.device("cpu"))
    assert sequence.tolist() == [1, 2, 0, 1]  # the longest first, in turn
    assert len(rows) == 5
    assert len(set(rows.tolist())) == 5
    assert torch.equal(counts[2], rows < 8)
    again = sample.draw(3, 4, 40, valid, torch.device("cpu"))
    assert again[1] is rows
    other = Sample(5, seed=1).draw(3, 4, 40, valid, torch.device("cpu"))
    assert other[1].tolist() != rows.tolist()
    assert AttentionProbe(5, 0).stats() == {}


def test_statistics_of_a_sample_are_near_those_of_all_rows() -> None:
    model = build_model(TINY).eval()
    ids = torch.randint(0, 97, (4, 128))
    whole, part = measure(model, ids, rows=128), measure(model, ids, rows=48)
    for tap in whole:
        if tap.attention is not None:
            found = part[tap.name].attention
            assert found is not None
            assert found.entropy == pytest.approx(tap.attention.entropy, rel=0.1)
            assert found.entropy != tap.attention.entropy


def test_attention_that_cannot_be_seen_is_said() -> None:
    class Hidden(Homemade):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.token(ids)
            for layer in self.layers:
                x = layer(x)
            return self.lm_head(self.last_norm(x))

    model = Hidden()
    for layer in model.layers:  # its own normalisation, by hand
        mixer: Any = layer.mixer
        mixer.forward = lambda x, m=mixer: m.wo(m.wv(x) * (m.wq(x) * m.wk(x)).sum(-1, keepdim=True).exp())
    trace = measure(model, torch.randint(0, 50, (2, 6)))
    assert all(tap.attention is None for tap in trace)
    assert any("no statistics for 3 of 3 attentions" in note for note in trace.notes)
