"""transformers: the attention functions that its Llama calls, its caches, and Llama itself.

The option is the implementation, "sdpa" or "eager"; "sdpa static" decodes with a static cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clearhead.bench.prepared import Attend, Problem, Step, Training, plain_step

NAMES = (
    ("embedding.", "model.embed_tokens."),
    ("blocks.", "model.layers."),
    (".attention_residual.norm.", ".input_layernorm."),
    (".feed_forward_residual.norm.", ".post_attention_layernorm."),
    (".attention.query.", ".self_attn.q_proj."),
    (".attention.key.", ".self_attn.k_proj."),
    (".attention.value.", ".self_attn.v_proj."),
    (".attention.output.", ".self_attn.o_proj."),
    (".feed_forward.gate.", ".mlp.gate_proj."),
    (".feed_forward.up.", ".mlp.up_proj."),
    (".feed_forward.down.", ".mlp.down_proj."),
)
"""Our names of Llama's weights, and its own."""


def _config(width: int, heads: int, head_dim: int, implementation: str, **more: Any) -> Any:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=width, num_attention_heads=heads, num_key_value_heads=heads, head_dim=head_dim, **more
    )
    config._attn_implementation = implementation
    return config


def _function(option: str, problem: Problem) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function as Llama's layer calls it, bound to such a layer."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

    shape, implementation = problem.shape, option.split()[0]
    layer = LlamaAttention(_config(8, shape.heads, shape.head_dim, implementation), 0).eval()
    function = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    return lambda q, k, v, mask: function(layer, q, k, v, mask, dropout=0.0, scaling=layer.scaling)


def attention(option: str, problem: Problem) -> Attend:
    """What runs in a layer between the projections; eager gets the additive mask that its model makes once."""
    function = _function(option, problem)
    mask = None
    if option == "eager":
        n, q = problem.shape.length, problem.q
        hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
        mask = torch.zeros(1, 1, n, n, dtype=q.dtype, device=q.device).masked_fill(hidden, torch.finfo(q.dtype).min)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out_bnhd, _ = function(q, k, v, mask)
        return out_bnhd.transpose(1, 2)

    return run


def decode(option: str, problem: Problem) -> Callable[[], Tensor]:
    """One token into its cache, and its attention over what that answers."""
    function = _function(option, problem)
    query, key, value = (t[:, :, -1:] for t in (problem.q, problem.k, problem.v))
    update = (_static if option.endswith("static") else _dynamic)(problem)

    def run() -> Tensor:
        keys, values = update(key, value)
        out_bnhd, _ = function(query, keys, values, None)
        return out_bnhd.transpose(1, 2)

    return run


Update = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _dynamic(problem: Problem) -> Update:
    from transformers.cache_utils import DynamicLayer

    layer: Any = DynamicLayer()
    past = problem.k[:, :, :-1].contiguous(), problem.v[:, :, :-1].contiguous()
    layer.update(*past)

    def update(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        layer.keys, layer.values = past
        return layer.update(key, value)

    return update


def _static(problem: Problem) -> Update:
    from transformers.cache_utils import StaticLayer

    layer: Any = StaticLayer(max_cache_len=problem.shape.length)
    layer.update(problem.k[:, :, :-1], problem.v[:, :, :-1])

    def update(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        found = layer.update(key, value)
        layer.cumulative_length.sub_(1)
        return found

    return update


def step(option: str, training: Training) -> Step:
    """Llama with our decoder's weights, and a plain loop."""
    from transformers import LlamaForCausalLM

    config = training.model.config
    ours = training.decoder("softmax", "llama")
    model: Any = LlamaForCausalLM(
        _config(
            config.width,
            config.heads,
            config.head_size,
            option,
            vocab_size=config.vocab_size,
            intermediate_size=config.hidden_size,
            num_hidden_layers=config.layers,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            use_cache=False,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        )
    )
    model.load_state_dict(llama_names(ours.state_dict()))
    model = model.to(training.device)
    called = _Logits(model)

    def loss() -> Tensor:
        return F.cross_entropy(called(training.inputs).flatten(0, 1), training.targets.flatten())

    return Step(called, plain_step(model, training, loss), model.model.embed_tokens.weight)


class _Logits(torch.nn.Module):
    """Tokens in, logits out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        return self.model(input_ids=tokens).logits


def llama_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our decoder's weights under Llama's names."""
    found = {}
    for name, tensor in state.items():
        for ours, theirs in NAMES:
            name = name.replace(ours, theirs)
        found[{"norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}.get(name, name)] = tensor
    return found
