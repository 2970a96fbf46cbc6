"""How many parameters a model has, by part, and how many operations a token costs."""

from __future__ import annotations

import math

import torch.nn as nn

from clearhead.attention.spec import Window
from clearhead.layers.feedback import FeedbackAttention
from clearhead.layers.gate import FixedGate, TokenGate
from clearhead.layers.temperature import LearnedTemperatures, SelectiveTemperatures, TokenPart
from clearhead.models.config import ModelConfig

# The first part that a parameter's path fits owns it, so inner modules stand before outer ones.
_PART_OF_MODULE: tuple[tuple[type[nn.Module], str], ...] = (
    (SelectiveTemperatures, "temperature"),
    (LearnedTemperatures, "temperature"),
    (FixedGate, "gate"),
    (TokenGate, "gate"),
    (nn.LayerNorm, "norm"),
    (nn.RMSNorm, "norm"),
)
_PART_OF_NAME = {
    "embedding": "embedding",
    "position": "position",
    "relative": "position",
    "relative_key": "position",
    "mix": "mix",
    "segment": "segment",
    "attention": "attention",
    "cross_attention": "cross_attention",
    "feed_forward": "feed_forward",
    "head": "head",
}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by part (embedding, position, segment, attention, cross_attention, feed_forward, norm, temperature,
    gate, head, mix: the mixture of a feedback memory) and "total".

    Every parameter is counted once; a tied output matrix is embedding. Parts without parameters are left out.
    """
    inner: dict[int, str] = {}
    for module in model.modules():
        for kind, part in _PART_OF_MODULE:
            if isinstance(module, kind):
                for parameter in module.parameters():
                    inner.setdefault(id(parameter), part)
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = inner.get(id(parameter)) or next(
            (_PART_OF_NAME[word] for word in name.split(".") if word in _PART_OF_NAME), "other"
        )
        counts[part] = counts.get(part, 0) + parameter.numel()
    counts["total"] = sum(counts.values())
    return counts


def multiplied_weights(model: nn.Module) -> int:
    """Weights that multiply each token: every linear map (the output matrix too, tied or not) and SSA's vectors.

    Embedding rows are looked up, not multiplied. The zeros with which "head_slice" pads its vectors are not counted.
    """
    maps = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return maps + sum(module.vector.numel() for module in model.modules() if isinstance(module, TokenPart))


def mean_visible_keys(config: ModelConfig, context: int, *, causal: bool = True) -> float:
    """Keys that a query sees, averaged over `context` positions; see `Pattern.mean_keys`."""
    return config.spec.pattern.mean_keys(context, causal=causal)


def _paid_keys(config: ModelConfig, seen: float) -> float:
    """Keys of dense attention that cost as much as a query which sees so many."""
    return config.spec.weights.equivalent_keys(seen)


def training_flops_per_token(model: nn.Module, config: ModelConfig, context: int) -> float:
    """Floating point operations per token, forward and backward, at `context` tokens.

        3 * (2 * W + 2 * heads * (key_size + head_dim) * sum over attentions of keys)

    For seq2seq it is the cost per target token of a pair whose source and target have `context` tokens each, both
    stacks together. W counts `multiplied_weights`: 2 operations per weight, multiply and add. Q K^T and A V cost 2
    operations each per query component and visible key; keys is `mean_visible_keys`, in cross attention the context.
    The backward pass costs twice the forward. key_size is head_dim, and with position=xl the sinusoid's components
    more. A performer pays for features instead of keys, at any context (`Performer.equivalent_keys`, with as many key
    heads as query heads). With a memory, keys are those of a full one, and what is remembered passes the key and value
    matrices again in every segment. For feedback, keys is `mean_memories` in each layer, and keys and values of
    memories cost what `memory_flops_per_token` says.
    Left out, as everywhere: norms, activations, softmax and what self_adjust and laser do to each weight or value, what
    a kernel makes again in its backward pass (scores; of a performer features, and the squares of its chunks), and the
    masked half that a kernel may compute in vain.

    Raises `ValueError` for a context below 1.
    """
    if context < 1:
        raise ValueError(f"flops_per_token: expected a context of at least 1 token, got {context}")
    if config.architecture == "feedback":
        attention = 4 * config.heads * config.head_size * config.layers * mean_memories(config, context)
        others = multiplied_weights(model) - _source_weights(model)
        return 3.0 * (2.0 * others + attention) + memory_flops_per_token(model, config, context)
    causal, both_ways = (_paid_keys(config, mean_visible_keys(config, context, causal=kind)) for kind in (True, False))
    remembered = 0.0
    if config.memory_layout is not None:
        lengths = config.memory_layout.lengths(config.layers, context)
        both_sizes = 2 * config.width * config.key_value_heads * config.head_size
        remembered = 2.0 * both_sizes * sum(lengths) / context
    keys = {
        "decoder": _keys_of_decoder(config, context, causal),
        "encoder": config.layers * both_ways,
        "seq2seq": config.layers * both_ways + config.decoder_depth * causal,
    }[config.architecture]
    crossed = config.decoder_depth * _paid_keys(config, context) if config.architecture == "seq2seq" else 0
    sizes = (config.key_size + config.head_size) * keys + 2 * config.head_size * crossed
    return 3.0 * (2.0 * multiplied_weights(model) + 2 * config.heads * sizes + remembered)


def _keys_of_decoder(config: ModelConfig, context: int, causal: float) -> float:
    """Keys per query, summed over layers, with the memory full."""
    layout = config.memory_layout
    if layout is None:
        return config.layers * causal
    most = config.spec.pattern.size if isinstance(config.spec.pattern, Window) else math.inf
    lengths = layout.lengths(config.layers, context)
    if layout.windowed:
        return float(sum(min(most, n + 1) for n in lengths))
    return sum(min(most, n + place) for n in lengths for place in range(1, context + 1)) / context


def mean_memories(config: ModelConfig, context: int) -> float:
    """Memories that a token of a Feedback Transformer sees, averaged over `context` positions."""
    window = config.feedback_window
    if config.feedback_start == "zeros":
        return float(window)
    rising = min(context, window)  # position p sees min(p, window) memories
    return (rising * (rising - 1) / 2 + (context - rising) * window) / context


def memory_flops_per_token(model: nn.Module, config: ModelConfig, context: int) -> float:
    """What keys and values of memories cost a token, forward and backward.

    Each memory is projected once, but for the last of a block, which nobody reads before the border. At each border
    the memories that are carried over are projected again; they are detached, so without a norm of their own (under
    post-norm) going back costs the matrices' gradients only: twice the forward in all, and not three times.
    """
    block, window = config.feedback_block, config.feedback_window
    borders = range(0, context, block)
    carried = sum(window if config.feedback_start == "zeros" else min(border, window) for border in borders)
    once = context - len(borders)
    again = 3 if config.norm_placement == "pre" else 2
    return 2.0 * _source_weights(model) * (3 * once + again * carried) / context


def _source_weights(model: nn.Module) -> int:
    """Weights that make keys and values of a memory, shared ones once."""
    found: dict[int, int] = {}
    for attention in model.modules():
        if isinstance(attention, FeedbackAttention):
            temperatures = attention.temperatures
            made = [getattr(temperatures, name, None) for name in ("key", "value")]
            for module in (attention.key, attention.value, *made):
                if module is not None:
                    found[id(module)] = multiplied_weights(module)
    return sum(found.values())
