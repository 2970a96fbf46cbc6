"""Our own models, torch's layers, timm's structure, models of unknown origin, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from clearhead.anatomy.find import anatomy_of
from clearhead.anatomy.parts import Anatomy, AttentionParts, FeedForwardParts
from clearhead.errors import UserError
from clearhead.models.config import PRESETS
from clearhead.models.make import build_model

TINY = dataclasses.replace(PRESETS["tiny"], width=32)


def placements(anatomy: Anatomy) -> set[str]:
    return {sub.placement for stack in anatomy.stacks for block in stack.blocks for sub in block.sublayers}


# ---- ours ----


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_our_decoder(placement: str) -> None:
    config = dataclasses.replace(TINY, norm_placement=placement, kv_heads=1, dropout=0.1, attention="self_adjust")
    model = build_model(config)
    anatomy = anatomy_of(model)
    assert anatomy.family == "clearhead"
    assert placements(anatomy) == {placement}
    assert (anatomy.stacks[0].final_norm is None) == (placement == "post")
    part = anatomy.attentions[0]
    assert (part.heads, part.kv_heads, part.head_dim, part.causal, part.rope_base) == (2, 1, 16, True, 10000.0)
    assert part.spec == "self_adjust"
    assert anatomy.head_tied
    assert anatomy.stacks[0].embedding_dropout == 0.1
    assert [sub.dropout for sub in anatomy.stacks[0].blocks[0].sublayers] == [0.1, 0.1]
    assert anatomy.unknown == ()
    assert anatomy.stacks[0].blocks[0].sublayers[0].rule is model.blocks[0].attention_residual.rule


def test_our_temperatures_and_gates_play_no_part() -> None:
    anatomy = anatomy_of(build_model(dataclasses.replace(TINY, attention="softmax+selective", output_gate="head")))
    assert anatomy.unknown
    assert all(".temperatures." in name or ".gate." in name for name in anatomy.unknown)


def test_our_encoder_and_seq2seq() -> None:
    encoder = anatomy_of(build_model(dataclasses.replace(TINY, architecture="encoder", segment_types=2)))
    assert [stack.name for stack in encoder.stacks] == ["encoder"]
    assert not encoder.attentions[0].causal
    assert [table.role for table in encoder.stacks[0].embeddings] == ["token", "segment"]
    both = anatomy_of(build_model(dataclasses.replace(TINY, architecture="seq2seq", decoder_layers=3)))
    assert [(stack.name, len(stack.blocks)) for stack in both.stacks] == [("encoder", 2), ("decoder", 3)]
    block = both.stacks[1].blocks[0]
    assert [sub.part for sub in block.sublayers] == ["attention", "cross_attention", "feed_forward"]
    assert [part.cross for part in both.attentions] == [False] * 2 + [False, True] * 3
    assert both.head is not None
    assert both.head_tied


# ---- torch ----


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torch_transformer(norm_first: bool, batch_first: bool) -> None:
    model = nn.Transformer(32, 4, 2, 3, 64, dropout=0.2, norm_first=norm_first, batch_first=batch_first)
    anatomy = anatomy_of(model)
    assert anatomy.family == "torch"
    assert placements(anatomy) == {"pre" if norm_first else "post"}
    assert [(stack.name, len(stack.blocks)) for stack in anatomy.stacks] == [("encoder", 2), ("decoder", 3)]
    decoder = anatomy.stacks[1]
    assert [sub.norm_path for sub in decoder.blocks[0].sublayers] == [
        f"decoder.layers.0.norm{number}" for number in (1, 2, 3)
    ]
    assert decoder.batch_first == batch_first
    assert anatomy.unknown == ()
    assert [sub.dropout for sub in decoder.blocks[0].sublayers] == [0.2] * 3
    part = anatomy.attentions[0]
    assert part.key.weight().data_ptr() == model.encoder.layers[0].self_attn.in_proj_weight[32:].data_ptr()
    assert anatomy.notes  # causality is an argument of the call


# ---- timm's structure; timm itself needs torchvision, so this is its block written down ----


class TimmAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, width // heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.Identity()
        self.attn_drop = nn.Dropout(0.3)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class TimmMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(4 * width, width), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class TimmBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width), TimmAttention(width, heads), nn.Identity()
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(width), TimmMlp(width), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.pos_drop = nn.Dropout(0.1)
        self.blocks = nn.Sequential(*(TimmBlock(width, 4) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(self.pos_drop(x)))[:, 0])


VisionTransformer.__module__ = "timm.models.vision_transformer"


def test_timm_structure() -> None:
    anatomy = anatomy_of(VisionTransformer())
    assert anatomy.family == "timm"
    assert placements(anatomy) == {"pre"}
    attention, feed_forward = anatomy.stacks[0].blocks[1].sublayers
    assert isinstance(attention.branch, AttentionParts)
    assert attention.branch.key.rows == (32, 64)
    assert (attention.branch.heads, attention.branch.dropout, attention.dropout) == (4, 0.3, 0.2)
    assert (feed_forward.branch.dropout, feed_forward.dropout) == (0.1, 0.2)
    assert [(table.leaf, table.role) for table in anatomy.stacks[0].embeddings] == [("pos_embed", "position")]
    assert anatomy.stacks[0].embedding_dropout == 0.1
    assert anatomy.stacks[0].final_norm_path == "norm"
    assert anatomy.head is not None
    assert set(anatomy.unknown) == {"cls_token", "patch_embed.weight", "patch_embed.bias"}


# ---- somebody's own ----


class Mixer(nn.Module):
    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.num_heads = 4
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.hide = causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if self.hide:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -1e9)
        return self.wo((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, post: bool, causal: bool) -> None:
        super().__init__()
        self.mixer = Mixer(width, causal)
        self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.norm_a, self.norm_b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.post = post

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm_a(x + self.mixer(x))
            return self.norm_b(x + self.net(x))
        x = x + self.mixer(self.norm_a(x))
        return x + self.net(self.norm_b(x))


class Homemade(nn.Module):
    def __init__(self, post: bool = False, causal: bool = True, width: int = 32) -> None:
        super().__init__()
        self.token = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Layer(width, post, causal) for _ in range(3))
        self.last_norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.last_norm(x))


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_unknown_model_is_tried_out(post: bool, causal: bool) -> None:
    """A final norm follows in both cases: only running a block tells where its norms stand and what it hides."""
    state = torch.get_rng_state()
    anatomy = anatomy_of(Homemade(post, causal))
    assert anatomy.family == "unknown"
    assert placements(anatomy) == {"post" if post else "pre"}
    assert anatomy.attentions[0].causal == causal
    assert anatomy.stacks[0].name == ("decoder" if causal else "encoder")
    branch = anatomy.stacks[0].blocks[2].sublayers[1].branch
    assert isinstance(branch, FeedForwardParts)
    assert (branch.activation, branch.up.path, branch.down.path) == ("silu", "layers.2.net.0", "layers.2.net.2")
    assert anatomy.unknown == ()
    assert anatomy.notes == ()
    Homemade()  # construction draws numbers, so the state is compared before and after the search alone
    torch.set_rng_state(state)
    model = Homemade(post, causal)
    before = torch.get_rng_state()
    anatomy_of(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_assumptions_are_said() -> None:
    model = Homemade()
    for layer in model.layers:
        del layer.mixer.num_heads
    anatomy = anatomy_of(model)
    assert anatomy.attentions[0].heads == 1
    assert any("how many heads" in note for note in anatomy.notes)


def test_wrappers_are_looked_through() -> None:
    model = build_model(TINY)
    assert anatomy_of(torch.compile(model)).model is model  # type: ignore[arg-type]
    assert anatomy_of(torch.compile(model)).attentions[0].path == "blocks.0.attention"  # type: ignore[arg-type]


def test_a_model_without_attention_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"no attention found in Sequential") as caught:
        anatomy_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    assert "\n" not in str(caught.value)
