"""Parameter groups, counts and operation counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clearhead.attention.mask import Mask
from clearhead.models.accounting import mean_visible_keys
from clearhead.models.config import ModelConfig
from clearhead.models.decoder import Decoder

BASE = ModelConfig(vocab_size=50, layers=2, width=32, heads=4, context=24)
VARIANTS = [
    {},
    {"attention": "softmax+selective", "temperature_granularity": "shared", "kv_heads": 2},
    {"attention": "softmax+selective", "temperature_granularity": "head_full", "temperature_parts": "token"},
    {"attention": "laser+learned", "output_gate": "fixed", "position": "learned", "norm": "layer"},
    {"position": "xl", "xl_width": 12, "attention": "laser"},
    {"output_gate": "element", "tie_embeddings": False, "qk_norm": True, "feed_forward": "relu"},
]


LEARNED = [{"position": "t5"}, {"position": "kerple"}, {"position": "fire"}]  # no fused kernel trains them


@pytest.mark.parametrize("options", VARIANTS + LEARNED, ids=str)
def test_every_parameter_is_in_exactly_one_group_and_one_part(options):
    model = Decoder(dataclasses.replace(BASE, **options))
    groups = model.parameter_groups()
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    torch.optim.AdamW([{"params": group["params"]} for group in groups])  # refuses a parameter in two groups

    counts = model.count_parameters()
    assert counts.pop("total") == sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert "other" not in counts


def test_who_decays_and_who_learns_faster():
    model = Decoder(
        dataclasses.replace(BASE, attention="softmax+selective", output_gate="fixed", temperature_lr_scale=7.0)
    )
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {g["name"]: {names[id(p)] for p in g["params"]} for g in model.parameter_groups()}
    scales = {g["name"]: (g["weight_decay_scale"], g["lr_scale"]) for g in model.parameter_groups()}
    assert scales == {"matrices": (1.0, 1.0), "no_decay": (0.0, 1.0), "temperature": (0.0, 7.0)}
    assert groups["temperature"] == {name for name in names.values() if ".temperatures." in name}
    assert "embedding.weight" in groups["no_decay"]
    assert "blocks.0.attention.gate.scale" in groups["no_decay"]
    assert "blocks.0.attention_residual.norm.weight" in groups["no_decay"]
    assert "blocks.1.feed_forward.down.weight" in groups["matrices"]

    untied = Decoder(dataclasses.replace(BASE, tie_embeddings=False))
    matrices = untied.parameter_groups()[0]
    assert any(p is untied.head.weight for p in matrices["params"])


def test_counts_by_hand():
    counts = Decoder(dataclasses.replace(BASE, attention="softmax+selective", hidden=40)).count_parameters()
    assert counts == {
        "embedding": 50 * 32,
        "attention": 2 * 4 * 32 * 32,
        "feed_forward": 2 * 3 * 32 * 40,
        "norm": 5 * 32,
        "temperature": 2 * 2 * (32 + 1),
        "total": 50 * 32 + 2 * 4 * 32 * 32 + 2 * 3 * 32 * 40 + 5 * 32 + 2 * 2 * 33,
    }


@pytest.mark.parametrize(
    "attention",
    [
        "softmax",
        "laser",
        "softmax+window:7",
        "softmax+window:99",
        "bigbird:block_size=4,random_blocks=1",
        "laser+bigbird:2,global_tokens=3",
    ],
)
def test_mean_visible_keys_is_the_mean_of_what_the_mask_shows(attention):
    config = dataclasses.replace(BASE, attention=attention)
    for causal, mask in ((True, Mask.causal()), (False, Mask())):
        seen = config.spec.pattern.within(mask, config.heads, 23).visible_count(23, 23, "cpu").float().mean().item()
        assert mean_visible_keys(config, 23, causal=causal) == pytest.approx(seen)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_flops_agree_with_torch(options):
    """torch counts every product, and in its unfused attention the masked half too."""
    tokens, batch = 24, 3
    model = Decoder(dataclasses.replace(BASE, **options))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 50, (batch, tokens))).sum().backward()
    config = model.config
    hidden_keys = tokens - mean_visible_keys(config, tokens)
    masked_half = 3 * config.layers * 2 * config.heads * (config.key_size + config.head_size) * hidden_keys
    counted = counter.get_total_flops() / (batch * tokens)
    assert counted == pytest.approx(model.flops_per_token(tokens) + masked_half)


@pytest.mark.parametrize("layout", ["full:30", "lengths:0/40", "lengths:30/40,range=window"])
def test_flops_of_a_full_memory_agree_with_torch(layout):
    tokens, batch = 24, 3
    model = Decoder(dataclasses.replace(BASE, memory=layout, position="xl", xl_width=12))
    memory = model.new_memory(batch)
    for _ in range(2):
        model(torch.randint(0, 50, (batch, tokens)), memory=memory)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 50, (batch, tokens)), memory=memory).sum().backward()
    config = model.config
    hidden = 0.0
    for length in memory.lengths:
        seen = length + 1 if memory.windowed else length + 12.5
        hidden += tokens + length - seen
    hidden *= 3 * 2 * config.heads * (config.key_size + config.head_size)
    counted = counter.get_total_flops() / (batch * tokens)
    assert counted == pytest.approx(model.flops_per_token(tokens) + hidden)


def test_flops_by_hand_and_by_window():
    config = dataclasses.replace(BASE, hidden=40)
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 40) + 50 * 32
    assert Decoder(config).flops_per_token(24) == 3 * (2 * weights + 2 * 4 * 32 * 12.5)
    windowed = Decoder(dataclasses.replace(config, attention="softmax+window:1"))
    assert windowed.flops_per_token(24) == 3 * (2 * weights + 2 * 4 * 32)
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        windowed.flops_per_token(0)
