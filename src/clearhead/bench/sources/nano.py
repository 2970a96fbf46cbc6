"""A GPT as nanoGPT writes one, in plain torch: LayerNorm, GELU, learned positions, tied embeddings, no biases in the
matrices, one matrix for query, key and value. The option is "sdpa", or the spec that is written out in its place.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clearhead.attention.spec import AttentionSpec
from clearhead.bench.prepared import Step, Training, plain_step
from clearhead.bench.sources.written_out import formula, hidden_keys


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    hidden: Tensor

    def __init__(self, width: int, heads: int, hidden: int, attention: str, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.spec = None if attention == "sdpa" else AttentionSpec.parse(attention)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        if self.spec is not None:
            self.register_buffer("hidden", hidden_keys(self.spec, context, context, torch.device("cpu")), False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, t, w] -> [b, t, w]."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, dim=-1))
        if self.spec is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = formula(self.spec, q, k, v, self.hidden)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """Tokens [b, t] -> logits [b, t, V]."""

    def __init__(
        self, vocabulary: int, context: int, layers: int, width: int, heads: int, hidden: int, attention: str
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(Layer(width, heads, hidden, attention, context) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.tokens.weight)


def step(option: str, training: Training) -> Step:
    """With the weights of our decoder in GPT's form, and a plain loop."""
    config = training.model.config
    ours = training.decoder("softmax", "gpt")
    hidden = ours.state_dict()["blocks.0.feed_forward.up.weight"].shape[0]
    model = GPT(config.vocab_size, config.context, config.layers, config.width, config.heads, hidden, option)
    model.load_state_dict(gpt_names(ours.state_dict(), config.layers))
    model = model.to(training.device)

    def loss() -> Tensor:
        return F.cross_entropy(model(training.inputs).flatten(0, 1), training.targets.flatten())

    return Step(model, plain_step(model, training, loss), model.tokens.weight)


def gpt_names(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The weights of our decoder, in GPT's form, under the names above."""
    found = {"tokens.weight": state["embedding.weight"], "places.weight": state["position.table.weight"]}
    for end in ("weight", "bias"):
        found[f"norm.{end}"] = state[f"norm.{end}"]
    for i in range(layers):
        of, to = f"blocks.{i}.", f"layers.{i}."
        found[f"{to}qkv.weight"] = torch.cat([state[f"{of}attention.{x}.weight"] for x in ("query", "key", "value")])
        found[f"{to}out.weight"] = state[f"{of}attention.output.weight"]
        for name in ("up", "down"):
            found[f"{to}{name}.weight"] = state[f"{of}feed_forward.{name}.weight"]
        for end in ("weight", "bias"):
            found[f"{to}norm_1.{end}"] = state[f"{of}attention_residual.norm.{end}"]
            found[f"{to}norm_2.{end}"] = state[f"{of}feed_forward_residual.norm.{end}"]
    return found
