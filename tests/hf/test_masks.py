"""Masks: what transformers builds, what a user gives, padding, caches, packed documents."""

from __future__ import annotations

import pytest
import torch

import clearhead as ch
from clearhead.attention.mask import Mask
from clearhead.attention.terms import Dense
from clearhead.hf import masks
from clearhead.hf.function import listening
from tests.hf.tools import SPARSE, VOCABULARY, answer, batch_of, build

NAMES = ("llama", "gpt2", "bert", "t5", "bart", "mistral-window", "gemma3-window")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_equals_the_models_own(name, side):
    model, batch = build(name), batch_of(name, side)
    own = answer(model, batch)
    ch.hf.patch(model, "softmax")
    assert (answer(model, batch) - own).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_padding_of_a_source_is_invisible_to_cross_attention(name):
    model, batch = build(name), batch_of(name, "right")
    ch.hf.patch(model, "laser")
    edited = dict(batch, input_ids=torch.where(batch["attention_mask"].bool(), batch["input_ids"], 5))
    assert (answer(model, edited) - answer(model, batch)).abs().max() < 1e-12


@pytest.mark.parametrize("spec", ["laser", "self_adjust", SPARSE, "performer"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padding_is_invisible(name, side, spec):
    """An edit of padding changes nothing, and a padded sequence is the same sequence alone: patterns start at its first
    token. Nothing is NaN, though a padded query sees no key."""
    model, batch = build(name), batch_of(name, side)
    ch.hf.patch(model, spec)
    whole = model(**batch).logits
    edited = dict(batch, input_ids=torch.where(batch["attention_mask"].bool(), batch["input_ids"], 5))
    assert whole.isfinite().all()
    assert (answer(model, edited) - answer(model, batch)).abs().max() < 1e-12
    if name == "bert" and side == "left":
        return  # its positions are learned by column: the same sequence alone is another input
    valid = batch["attention_mask"][2].bool()
    positions = {"position_ids": torch.arange(int(valid.sum()))[None]}
    alone = model(input_ids=batch["input_ids"][2:, valid], **positions).logits
    if name == "llama":
        counted = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        whole = model(**batch, position_ids=counted).logits
    assert (whole[2, valid] - alone[0]).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3-window", "gpt2"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_decoding_with_a_cache_equals_the_whole(name, kind, side):
    from transformers import DynamicCache, StaticCache

    model, batch = build(name), batch_of(name, side)
    ch.hf.patch(model, "laser")
    ids, padding = batch["input_ids"], batch.get("attention_mask")
    extra = {}
    if padding is not None:
        extra["position_ids"] = (padding.cumsum(-1) - 1).clamp_min(0)
    whole = model(**batch, **extra).logits
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=20)
    parts = []
    for first, last in ((0, 5), (5, 6), (6, 9), (9, 10), (10, 11), (11, 12)):
        more = {}
        if padding is not None:
            more = {"attention_mask": padding[:, :last], "position_ids": extra["position_ids"][:, first:last]}
        parts.append(model(ids[:, first:last], past_key_values=cache, use_cache=True, **more).logits)
    stepped = torch.cat(parts, dim=1)
    valid = torch.ones_like(ids).bool() if padding is None else padding.bool()
    assert (stepped - whole)[valid].abs().max() < 1e-9


def test_a_lone_query_sees_every_key_without_a_mask():
    """A layer that is handed no mask and has `is_causal`: bottom-right, so that decoding does not see key 0 alone."""
    function = _function("softmax")
    module = torch.nn.Module()
    module.is_causal = True
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    out, weights = function(module, q, k, v, None)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert weights is None
    assert out.shape == (2, 1, 4, 8)
    assert torch.allclose(out.transpose(1, 2), expected, atol=1e-6)
    module.is_causal = False
    both, _ = function(module, q.expand(2, 4, 3, 8), k, v, None)
    assert torch.allclose(both[:, 0], both[:, 2])


def _function(spec):
    from clearhead.attention.spec import AttentionSpec
    from clearhead.hf.function import make_function

    return make_function(AttentionSpec.parse(spec))


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_packed_documents_equal_the_documents_alone(name):
    model = build(name)
    ids = torch.randint(3, VOCABULARY, (1, 12))
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    own = model(ids, position_ids=positions, use_cache=False).logits
    ch.hf.patch(model, "softmax")
    assert (model(ids, position_ids=positions, use_cache=False).logits - own).abs().max() < 1e-10
    ch.hf.unpatch(model)
    ch.hf.patch(model, "laser")
    packed = model(ids, position_ids=positions, use_cache=False).logits
    for part in (slice(0, 7), slice(7, 12)):
        assert (packed[:, part] - model(ids[:, part]).logits).abs().max() < 1e-10


def test_packed_documents_by_their_ends():
    """`cu_seq_lens`: what a collator for the varlen kernels passes, with no mask to go by."""
    model = build("llama")
    ids, ends = torch.randint(3, VOCABULARY, (1, 12)), torch.tensor([0, 7, 12])
    ch.hf.patch(model, "self_adjust")
    told = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}
    packed = model(ids, position_ids=torch.arange(12)[None], attention_mask=torch.ones(1, 12), **told).logits
    alone = model(ids[:, 7:], position_ids=torch.arange(7, 12)[None]).logits
    assert (packed[:, 7:] - alone).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["bool", "float", "bias"])
def test_a_mask_of_the_users_own(kind):
    model, ids = build("llama"), batch_of("llama")["input_ids"]
    torch.manual_seed(0)
    seen = (torch.rand(3, 1, 12, 12) < 0.5) | torch.eye(12, dtype=torch.bool)
    mask = seen
    if kind != "bool":
        added = torch.randn(3, 1, 12, 12, dtype=torch.float64) * (kind == "bias")
        mask = torch.where(seen, added, torch.finfo(torch.float64).min)
    own = model(ids, attention_mask=mask).logits
    ch.hf.patch(model, "softmax")
    assert (model(ids, attention_mask=mask).logits - own).abs().max() < 1e-10


@pytest.mark.parametrize("spec", ["performer", "performer:kernel=relu"])
def test_performer_refuses_a_window_by_the_name_of_the_layer(spec):
    from clearhead.errors import UserError

    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn: performer refuses a mask of kind band"):
        ch.hf.patch(build("mistral-window"), spec)


@pytest.fixture(autouse=True)
def _kinds():
    masks.learn_kinds()


# ---- the mask function ----------------------------------------------------------------------------------------------


def _masks_seen(model, batch, **more):
    kinds = []
    with listening(lambda call: kinds.append(call.causal)):
        model(**batch, **more)
    return kinds


def test_plain_masks_are_never_written_out(monkeypatch):
    """No dense term and no dense tensor for causal, window, padding and packed documents: memory linear in length."""
    monkeypatch.setattr(masks.VisibleKeys, "dense", lambda self: pytest.fail("a dense mask was made"))
    monkeypatch.setattr(Mask, "dense", lambda tensor: pytest.fail("a dense mask was made"))
    model = build("gemma3-window")
    ch.hf.patch(model, "self_adjust")
    for side in ("none", "left", "right"):
        assert _masks_seen(model, batch_of("llama", side)) == [True, True]
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    model(torch.randint(3, VOCABULARY, (1, 12)), position_ids=positions, use_cache=False)


def test_padding_with_holes_hides_the_holes():
    model = build("llama")
    ids, padding = batch_of("llama")["input_ids"], torch.ones(3, 12, dtype=torch.long)
    padding[0, 3:5] = 0
    padding[1, [0, 4]] = 0
    own = model(ids, attention_mask=padding).logits[padding.bool()]
    ch.hf.patch(model, "softmax")
    assert (model(ids, attention_mask=padding).logits[padding.bool()] - own).abs().max() < 1e-10


def test_transformers_composes_intersections_under_the_name_that_graphs_look_for():
    from transformers import masking_utils as made

    assert made.and_masks(made.causal_mask_function).__name__ == masks._INTERSECTION
    assert made.or_masks(made.causal_mask_function).__name__ != masks._INTERSECTION


def test_a_function_that_is_not_known_becomes_the_dense_mask_of_transformers():
    from transformers import masking_utils as made

    def both_ways_in_the_prefix(b, h, q, k):
        return k < 3

    function = made.or_masks(made.causal_mask_function, both_ways_in_the_prefix)
    visible = masks.mask_function(2, 6, 6, mask_function=function, use_vmap=True)
    expected = torch.ones(6, 6).tril().bool()
    expected[:, :3] = True
    assert torch.equal(visible.dense()[1, 0], expected)
    assert not visible.mask.is_causal
    chunked = made.chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.long))
    visible = masks.mask_function(2, 6, 6, mask_function=chunked)
    assert visible.mask.is_causal  # no future in it: patterns may count on that
    assert visible.mask.find(Dense)


def test_a_mask_looks_like_a_tensor_to_a_model_that_computes_with_it():
    visible = masks.mask_function(2, 5, 7, q_offset=2)
    dense = visible.dense()
    assert tuple(visible.shape) == tuple(dense.shape) == (2, 1, 5, 7)
    assert visible.dim() == visible.ndim == 4
    assert torch.equal(visible[:, :, :, :3], dense[:, :, :, :3])
    assert torch.equal(torch.cat([visible, dense], dim=-1), torch.cat([dense, dense], dim=-1))
    assert torch.equal(torch.where(visible, 1.0, 0.0), dense.float())
    assert torch.equal(~visible, ~dense)
    assert torch.equal(visible.to(torch.float32), dense.float())
    assert visible.to("cpu") is visible
    assert visible.expand(2, 3, 5, 7).shape == (2, 3, 5, 7)


def test_a_mask_of_other_lengths_is_refused():
    visible = masks.mask_function(2, 5, 7, q_offset=2)
    with pytest.raises(ValueError, match="5 queries and 7 keys; the call has 2, 5 and 6"):
        masks.read(visible, 5, 6, 2, causal=True, window=None)
    with pytest.raises(TypeError, match=r"bool .* or float"):
        masks.read(torch.ones(1, 1, 5, 5, dtype=torch.long), 5, 5, 1, causal=True, window=None)
