"""What models pass beside queries, keys and values: caps, sinks, position biases, windows, a request for weights."""

from __future__ import annotations

import pytest
import torch

import clearhead as ch
from clearhead.attention.mask import Mask
from clearhead.attention.spec import AttentionSpec
from clearhead.errors import UserError
from clearhead.hf import keywords, written
from clearhead.hf.function import make_function
from tests.hf.tools import SPARSE, answer, batch_of, build, eager


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_capped_scores_and_sinks_equal_the_models_own(name, side):
    """Both models' own attention is eager. Gemma 2's softmax is in float32 whatever the dtype, where the smallest
    float64 becomes -inf and a padded query NaN; so that model is compared in float32."""
    double = name != "gemma2"
    model, batch = build(name, double=double), batch_of(name, side, double=double)
    eager(model)
    own = answer(model, batch)
    report = ch.hf.patch(model, "softmax")
    assert ("softcap" if name == "gemma2" else "s_aux") in report.layers[0].keywords
    assert (answer(model, batch) - own).abs().max() < (1e-10 if double else 1e-5)


def _scores(n=5, m=6, h=4, g=2, d=8):
    torch.manual_seed(0)
    shape = {"dtype": torch.float64, "requires_grad": True}
    return torch.randn(2, h, n, d, **shape), torch.randn(2, g, m, d, **shape), torch.randn(2, g, m, d, **shape)


@pytest.mark.parametrize("spec", ["softmax", "laser", "self_adjust:form=minmax", "softmax+window:3"])
def test_capped_scores_under_any_weights_and_read(spec):
    """Far below the cap a tanh is the identity: scores written out are the attention that every test of `attend` is on,
    values and gradients. At the cap they are not."""
    from clearhead.attention.attend import attend

    q, k, v = _scores()
    mask = Mask.causal() & Mask.key_range(torch.tensor([0, 2]), None)
    common = {"mask": mask, "temperatures": None, "scale": None, "dropout_p": 0.0}
    plain = attend(q, k, v, spec, **common).out
    capped = [
        written.attend_written(
            q, k, v, AttentionSpec.parse(spec), bias=None, softcap=cap, sinks=None, want=(), **common
        ).out
        for cap in (1e6, 0.5)
    ]
    assert (capped[0] - plain).abs().max() < 1e-10
    assert (capped[1] - plain).abs().max() > 1e-3
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (plain, capped[0])]
    assert all((a - b).abs().max() < 1e-9 for a, b in zip(*gradients, strict=True))


def test_a_sink_is_one_more_key_with_a_value_of_zero():
    """Against the definition, with its gradient; a query that sees nothing but the sink reads 0."""
    q, k, v = _scores()
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    mask = Mask.causal() & Mask.key_range(torch.tensor([0, 3]), None)
    out = written.attend_written(
        q, k, v, AttentionSpec(), mask=mask, bias=None, temperatures=None, scale=None, dropout_p=0.0, softcap=None,
        sinks=sinks, want=("weights",),
    )  # fmt: skip
    seen = mask.dense_tensor(5, 6, q.device)
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5).masked_fill(~seen, float("-inf"))
    sink = sinks.view(1, 4, 1, 1).expand(2, 4, 5, 1)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    expected = weights @ v.repeat_interleave(2, 1)
    assert (out.out - expected).abs().max() < 1e-12
    assert (out.extras["weights"] - weights).abs().max() < 1e-12
    assert out.out[1, :, 0].abs().max() == 0
    mine, theirs = (torch.autograd.grad(x.square().sum(), (q, k, v, sinks)) for x in (out.out, expected))
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    [
        ("gpt_oss", "laser", r"self_attn: attention 'laser' cannot stand in here.*sum to less than 1"),
        ("gpt_oss", "self_adjust", "self_adjust weights with one more logit"),
        ("gpt_oss", "performer", "performer never makes a score"),
        ("gemma2", "performer", "caps its scores by a tanh, and performer never makes a score"),
        ("t5", "performer", r"SelfAttention: performer refuses a bias"),
    ],
)
def test_refusals_name_the_layer_and_the_reason(name, spec, reason):
    model = build(name)
    before = model.config._attn_implementation
    with pytest.raises(UserError, match=reason):
        ch.hf.patch(model, spec)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("spec", ["softmax", "laser"])
def test_gradients_reach_the_position_table_of_t5(spec):
    model, batch = build("t5"), batch_of("t5", "right")
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    (own,) = torch.autograd.grad(model(**batch).logits.square().sum(), table)
    ch.hf.patch(model, spec)
    (mine,) = torch.autograd.grad(model(**batch).logits.square().sum(), table)
    assert mine.isfinite().all()
    assert mine.abs().max() > 0
    if spec == "softmax":
        assert (mine - own).abs().max() < 1e-8 * own.abs().max()


def test_a_window_without_a_mask_is_the_layers_own():
    """A model that makes no mask passes `sliding_window` alone."""
    module = torch.nn.Module()
    q, k, v = _scores(n=6)
    for causal in (True, False):
        module.is_causal = causal
        out, _ = make_function(AttentionSpec())(module, q, k, v, None, sliding_window=3)
        far = torch.arange(6)[:, None] - torch.arange(6)
        seen = (far < 3) & (far >= 0) if causal else far.abs() < 3
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        assert (out.transpose(1, 2) - expected).abs().max() < 1e-10


def test_a_learned_scale_keeps_its_gradient():
    module = torch.nn.Module()
    q, k, v = _scores()
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    out, _ = make_function(AttentionSpec.parse("laser"))(module, q, k, v, None, scaling=scale)
    (slope,) = torch.autograd.grad(out.sum(), scale)
    nearby = [
        make_function(AttentionSpec.parse("laser"))(module, q, k, v, None, scaling=x)[0].sum() for x in (0.301, 0.299)
    ]
    assert abs(slope - (nearby[0] - nearby[1]) / 0.002) < 1e-5 * slope.abs()


def test_keywords_are_handled_or_known_to_change_nothing_or_refused():
    assert (
        keywords.read({"position_ids": torch.zeros(1), "unheard": None, "output_router_logits": True}, "x").softcap
        is None
    )
    with pytest.raises(UserError, match=r"^x: its model passes indices= to the attention"):
        keywords.read({"indices": torch.zeros(1)}, "x")


def test_a_keyword_that_is_not_handled_is_refused_by_layer_and_the_model_put_back(monkeypatch):
    import transformers.models.llama.modeling_llama as llama

    model = build("llama")
    own = llama.LlamaAttention.forward
    monkeypatch.setattr(llama.LlamaAttention, "forward", lambda self, *a, **k: own(self, *a, **k, block_indices=3))
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn: .*block_indices="):
        ch.hf.patch(model, "laser")
    assert model.config._attn_implementation == "sdpa"
    assert not [name for module in model.modules() for name in vars(module) if "clearhead" in name]


# ---- weights that are asked for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "bart", "whisper", "vit", "gpt_oss"])
def test_weights_that_are_asked_for_are_the_real_ones(name):
    model, batch = build(name), batch_of(name, "right" if name in ("llama", "bert") else "none")
    eager(model)
    own = model(**batch, output_attentions=True)
    ch.hf.patch(model, "softmax")
    mine = model(**batch, output_attentions=True)
    kinds = [kind for kind in own if "attentions" in kind and own[kind]]
    assert kinds
    for kind in kinds:
        assert len(mine[kind]) == len(own[kind]) == 2
        for a, b in zip(mine[kind], own[kind], strict=True):
            assert a.shape == b.shape
            assert (a - b).abs().max() < 1e-6
    assert not model(**batch).get("attentions")


@pytest.mark.parametrize("spec", ["laser", "self_adjust", SPARSE, "performer"])
def test_weights_of_other_mechanisms(spec):
    model, batch = build("llama"), batch_of("llama")
    ch.hf.patch(model, spec)
    weights = model(**batch, output_attentions=True).attentions
    assert len(weights) == 2
    assert (weights[0].triu(1) == 0).all()
    if spec != "self_adjust":
        assert torch.allclose(weights[0].sum(-1), torch.ones(()).double())


def test_weights_that_cannot_be_given_are_an_error_and_no_empty_tuple(monkeypatch):
    """As in a model that asks its layers for weights in a way that the attention function does not see."""
    from clearhead.hf import function

    model, batch = build("llama"), batch_of("llama")
    ch.hf.patch(model, "softmax")
    monkeypatch.setattr(function, "weights_are_collected", lambda: False)
    import transformers.models.llama.modeling_llama as llama

    own = llama.LlamaAttention.forward

    def forward(self, *arguments, output_attentions=None, **others):
        return own(self, *arguments, **others)

    monkeypatch.setattr(llama.LlamaAttention, "forward", forward)
    with pytest.raises(UserError, match="output_attentions=True"):
        model(**batch, output_attentions=True)
