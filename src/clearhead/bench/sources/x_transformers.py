"""x-transformers: its own `Attention` layer and its own decoder. The option is ["laser "] ("flash" | "no flash").

The layer's projections, and the moves of heads about them, are taken out: what runs is its own forward pass from
queries, keys and values on. With `flash` it calls PyTorch's `scaled_dot_product_attention`. Its LASER clamps the values
softly, exponentiates them without a shift, attends, and takes the logarithm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clearhead.bench.prepared import Attend, Problem, Step, Training, plain_step

CLAMP = 15.0
"""Its default `laser_softclamp_value`."""


class Given(nn.Module):
    """Answers what it was given, whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.held: Tensor | None = None

    def forward(self, _: Tensor) -> Tensor | None:
        """See the class."""
        return self.held


def _layer(option: str, problem: Problem) -> tuple[Any, list[Given]]:
    from x_transformers.x_transformers import Attention

    shape = problem.shape
    layer = Attention(
        dim=shape.heads * shape.head_dim,
        heads=shape.heads,
        dim_head=shape.head_dim,
        causal=True,
        flash=not option.endswith("no flash"),
        laser=option.startswith("laser"),
        laser_softclamp_value=CLAMP,
    )
    given = [Given() for _ in range(3)]
    layer.to_q, layer.to_k, layer.to_v = given
    layer.split_q_heads = layer.split_k_heads = layer.split_v_heads = nn.Identity()
    layer.merge_heads = layer.to_out = nn.Identity()
    return layer, given


def attention(option: str, problem: Problem) -> Attend:
    """Its layer on given queries, keys and values."""
    layer, given = _layer(option, problem)
    shape = problem.shape
    looked_at = problem.q.new_empty(shape.batch, shape.length, 1)  # it reads the sizes off its input

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for place, tensor in zip(given, (q, k, v), strict=True):
            place.held = tensor
        return layer(looked_at)

    return run


def decode(option: str, problem: Problem) -> Callable[[], Tensor]:
    """Its own cache: keys and values are concatenated for each token."""
    from x_transformers.attend import Intermediates

    layer, given = _layer(option, problem)
    looked_at = problem.q.new_empty(problem.shape.batch, 1, 1)
    for place, tensor in zip(given, (problem.q, problem.k, problem.v), strict=True):
        place.held = tensor[:, :, -1:].contiguous()
    past = problem.k[:, :, :-1].contiguous(), problem.v[:, :, :-1].contiguous()

    def run() -> Tensor:
        out, _ = layer(looked_at, cache=Intermediates(cached_kv=past), return_intermediates=True)
        return out

    return run


def clamped(v: Tensor) -> Tensor:
    """What its LASER reads in the place of the values."""
    return CLAMP * torch.tanh(v / CLAMP)


def step(option: str, training: Training) -> Step:
    """Its decoder, as close to ours as its options allow: RMSNorm, SwiGLU, rotary, no biases, tied embeddings."""
    from x_transformers import Decoder, TransformerWrapper

    config = training.model.config
    torch.manual_seed(training.seed)
    layers = Decoder(
        dim=config.width,
        depth=config.layers,
        heads=config.heads,
        attn_dim_head=config.head_size,
        attn_flash=not option.endswith("no flash"),
        attn_laser=option.startswith("laser"),
        rotary_pos_emb=True,
        rotary_emb_dim=config.head_size,
        use_rmsnorm=True,
        ff_glu=True,
        ff_swish=True,
        ff_no_bias=True,
        ff_mult=(config.hidden_size + 0.5) / config.width,  # it rounds down
    )
    model = TransformerWrapper(
        num_tokens=config.vocab_size,
        max_seq_len=config.context,
        attn_layers=layers,
        tie_embedding=True,
        use_abs_pos_emb=False,
    ).to(training.device)

    def loss() -> Tensor:
        return F.cross_entropy(model(training.inputs).flatten(0, 1), training.targets.flatten())

    return Step(model, plain_step(model, training, loss), model.token_emb.emb.weight)
