"""BigBird: our blocks in place of its own, which it leaves for good after one short batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch import Tensor

pytest.importorskip("transformers")

from clearhead import hf
from clearhead.errors import UserError
from clearhead.hf import checks, zoo
from clearhead.hf.zoo_entries import ENTRIES

SPEC = "bigbird:block_size=2,random_blocks=1"
SPARSE = ENTRIES["big_bird"]


def logits(model: nn.Module, **batch: Tensor) -> Tensor:
    with torch.no_grad():
        return checks.outputs(model, batch)


@pytest.fixture
def sparse() -> nn.Module:
    return zoo.build(SPARSE)


def test_a_sparse_model_is_a_full_one_with_the_pattern(sparse: nn.Module) -> None:
    full = zoo.build("big_bird-full")
    full.load_state_dict(sparse.state_dict())
    hf.patch(sparse, SPEC)
    hf.patch(full, SPEC)
    for side in ("none", "left", "right"):
        batch = zoo.inputs(SPARSE, side)  # type: ignore[arg-type]
        assert torch.equal(logits(sparse, **batch), logits(full, **batch))
    hf.unpatch(full)
    assert not torch.allclose(logits(sparse, **batch), logits(full, **batch)), "the pattern hides nothing"


def test_every_check_passes_where_its_own_attention_sees_padding(sparse: nn.Module) -> None:
    assert checks.padding_absent(sparse, SPARSE) is not None
    report = hf.patch(sparse, SPEC)
    assert checks.every_layer_called(report, SPARSE) is None
    for name, check in checks.BEHAVIOUR.items():
        assert check(sparse, SPARSE) is None, name
    assert checks.gradients(sparse, SPARSE, tuple(layer.name for layer in report.layers)) is None


def test_a_short_batch_leaves_no_trace(sparse: nn.Module) -> None:
    long, short = zoo.inputs(SPARSE), {"input_ids": zoo.inputs(SPARSE)["input_ids"][:, :6]}
    other = zoo.build(SPARSE)
    before = logits(other, **long)
    logits(other, **short)
    assert not torch.equal(logits(other, **long), before), "the library mended its own; say so in the docs"
    hf.patch(sparse, SPEC)
    before = logits(sparse, **long)
    logits(sparse, **short)
    assert torch.equal(logits(sparse, **long), before)


def test_unpatch_gives_back_block_sparse_attention(sparse: nn.Module) -> None:
    before = checks.Before.of(sparse, SPARSE)
    kinds = [getattr(module, "attention_type", None) for module in sparse.modules()]
    hf.patch(sparse, SPEC)
    hf.unpatch(sparse)
    assert [getattr(module, "attention_type", None) for module in sparse.modules()] == kinds
    assert checks.unpatched(sparse, SPARSE, before) is None


def test_a_spec_that_would_make_it_dense_is_refused_with_its_own_sizes(sparse: nn.Module) -> None:
    with pytest.raises(UserError, match=r"block-sparse.*bigbird:block_size=2,random_blocks=1.*original_full"):
        hf.patch(sparse, "laser")
    hf.patch(sparse, "laser+" + SPEC)


def test_as_a_decoder_it_is_causal() -> None:
    """Its own block-sparse attention has no causal mask."""
    from transformers import BigBirdForCausalLM

    entry = zoo.Entry("big_bird-decoder", "decoder", "BigBirdForCausalLM", "BigBirdConfig", {
        **SPARSE.values, "is_decoder": True})  # fmt: skip
    model = zoo.build(entry)
    assert isinstance(model, BigBirdForCausalLM)
    assert checks.future_edit(model, entry) is not None, "the library mended its own; say so in the docs"
    report = hf.patch(model, SPEC)
    assert {layer.role for layer in report.layers} == {"causal"}
    for name, check in checks.BEHAVIOUR.items():
        assert check(model, entry) is None, name
