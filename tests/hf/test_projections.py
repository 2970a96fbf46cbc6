"""Where queries, keys and values are made: what a hook reads there is what the attention function gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn

from clearhead.errors import UserError
from clearhead.hf.projections import Projections, projections_of
from clearhead.hf.register import set_everywhere
from tests.anatomy.hf_models import batch_for
from tests.hf.patched import build

pytest.importorskip("transformers")

MODELS = (
    "llama", "gpt2", "bert", "t5", "bart", "whisper", "vit", "gpt_neox", "phi3", "qwen3", "phi", "opt", "gemma2",
    "mistral", "olmo2",
)  # fmt: skip
ROTARY = {"llama", "gpt_neox", "phi3", "qwen3", "phi", "gemma2", "mistral", "olmo2"}


class Recorder:
    """An attention function that keeps what each module hands it."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def __call__(self, module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **others: Any) -> Any:
        self.calls[module] = (query, key, value)
        return torch.zeros(*query.shape[:3], value.shape[-1]).transpose(1, 2).contiguous(), None


def record(model: Any, batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Projections]]:
    """What the function got, what the matrices answered, and where the projections are, each by attention module."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    recorder = Recorder()
    AttentionInterface.register("clearhead_test_recorder", recorder)
    AttentionMaskInterface.register("clearhead_test_recorder", sdpa_mask)
    set_everywhere(model, "clearhead_test_recorder")
    with torch.no_grad():
        model(**batch)
        paths = {module: path for path, module in model.named_modules()}
        got = {paths[module]: call for module, call in recorder.calls.items()}
        found = projections_of(model, got)
        answers: dict[str, torch.Tensor] = {}
        hooks = []
        for path, one in found.items():
            for child in {one.query.child, one.key.child, one.value.child}:
                name = f"{path}.{child}"
                hooks.append(
                    model.get_submodule(name).register_forward_hook(
                        lambda module, args, out, name=name: answers.update({name: out})
                    )
                )
        model(**batch)
    for hook in hooks:
        hook.remove()
    return got, answers, found


@pytest.mark.parametrize("name", MODELS)
def test_a_slice_is_what_the_attention_gets(name: str) -> None:
    model, batch = build(name).eval(), batch_for(name)
    if name in ROTARY:  # at position 0 nothing is turned
        batch["position_ids"] = torch.zeros_like(batch["input_ids"])
    got, answers, found = record(model, batch)
    assert len(got) == (6 if name in ("t5", "bart", "whisper") else 2)
    for path, received in got.items():
        one, module = found[path], model.get_submodule(path)
        for part, heads, x_bhnd in zip(("query", "key", "value"), (one.heads, one.kv_heads, one.kv_heads), received,
                                       strict=True):  # fmt: skip
            where = getattr(one, part)
            read = where.read(answers[f"{path}.{where.child}"])
            norm = getattr(module, f"{part[0]}_norm", None)
            if norm is not None and name == "olmo2":  # over all heads at once
                read = norm(read)
            read = read.unflatten(-1, (heads, one.head_dim))
            if norm is not None and name == "qwen3":
                read = norm(read)
            if name in ("whisper", "opt") and part == "query":
                read = read * module.scaling
            torch.testing.assert_close(read.transpose(1, 2), x_bhnd, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_fused_by_head_where_the_model_splits_by_itself(name: str) -> None:
    model = build(name).eval()
    path = "transformer.h.0.self_attention"
    module = model.get_submodule(path)
    one = projections_of(model, [path])[path]
    fused = torch.randn(2, 5, module.query_key_value.out_features)
    parts = module._reshape(fused) if name == "bloom" else module._split_heads(fused)
    for where, theirs in zip((one.query, one.key, one.value), parts, strict=True):
        if name == "falcon":
            theirs = theirs.transpose(1, 2)
        ours = where.read(fused).unflatten(-1, (-1, one.head_dim)).transpose(1, 2)
        if ours.shape[1] != theirs.shape[1]:  # Falcon repeats its keys and values for the queries of a group
            ours = ours.repeat_interleave(theirs.shape[1] // ours.shape[1], dim=1)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_codegen_has_four_blocks_of_queries_values_and_keys() -> None:
    import transformers

    config = transformers.CodeGenConfig(vocab_size=97, n_positions=32, n_embd=64, n_layer=1, n_head=8, rotary_dim=4)
    module = transformers.CodeGenForCausalLM(config).transformer.h[0].attn
    one = projections_of(transformers.CodeGenForCausalLM(config), ["transformer.h.0.attn"])["transformer.h.0.attn"]
    fused = torch.randn(2, 5, 192)
    split = fused.reshape(2, 5, 4, -1).split(16, dim=-1)  # as CodeGenAttention.forward takes it apart
    for where, theirs in zip((one.query, one.value, one.key), split, strict=True):
        theirs = module._split_heads(theirs, 8, 8, mp_num=4)
        assert torch.equal(where.read(fused).unflatten(-1, (8, 8)), theirs)


def test_what_cannot_be_found_is_refused_by_name() -> None:
    model = build("llama")
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp .*no matrices for query"):
        projections_of(model, ["model.layers.0.mlp"])
