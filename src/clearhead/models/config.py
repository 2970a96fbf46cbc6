"""The whole shape of a model in one frozen value. Imports no torch.

A value of `None` means "derived": the field keeps the `None`, so that `dataclasses.replace(config, heads=8)` derives
anew, and the derived number is a property (`key_value_heads`, `head_size`, `hidden_size`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from clearhead.attention.spec import AttentionSpec, Full, Performer, Window
from clearhead.memory.layout import MemoryLayout
from clearhead.models.choices import ADMIN, DEEPSCALE
from clearhead.models.config_rules import check, check_names


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides a model's parameters and its function.

    The `temperature_*` fields describe `selective` (SSA, arXiv 2411.12892) and are read only when `attention` names it;
    `learned` has no options. Raises `UserError` for a value that cannot be built.
    """

    architecture: str = "decoder"
    """decoder (causal, next token) | encoder (every token sees every token, masked tokens) | seq2seq (an encoder, and a
    decoder that also reads it: translation) | feedback (a decoder whose layers all see one memory of the past, made of
    all layers' outputs; token by token, so slow to train)."""
    vocab_size: int = 257
    """Number of token ids; the byte tokenizer has 257, and a masked LM needs one more for the mask."""
    context: int = 256
    """Training length in tokens. Learned positions end here; the others run on, untested by training."""
    layers: int = 4
    """Number of blocks; of the encoder, in a seq2seq model."""
    decoder_layers: int | None = None
    """seq2seq only: blocks of the decoder; None = `layers`."""
    width: int = 128
    """Size of the residual stream."""
    heads: int = 4
    """Number of query heads."""
    kv_heads: int | None = None
    """Number of key and value heads, a divisor of `heads`; None = `heads`."""
    head_dim: int | None = None
    """Size of one head; None = `width // heads`."""
    feed_forward: str = "swiglu"
    """swiglu | gelu | relu."""
    hidden: int | None = None
    """Hidden size of the feed-forward; None = 4 * width, for swiglu 8/3 * width rounded up to a multiple of 8 (three
    matrices instead of two: about the same number of weights)."""
    norm: str = "rms"
    """rms (RMSNorm) | layer (LayerNorm with weight and bias)."""
    norm_placement: str = "pre"
    """pre: x + f(norm(x)), and one norm after the last block | post: norm(x + f(x))."""
    embedding_norm: bool | None = None
    """A norm on the embedding, before its dropout (BERT); None = with deepscale and admin under norm_placement=post."""
    tie_embeddings: bool = True
    """The output matrix is the token embedding (of the decoder, in a seq2seq model)."""
    share_embeddings: bool = True
    """seq2seq only: encoder and decoder read one token table."""
    feedback_window: int = 64
    """feedback only: memories that a token sees, those of the tokens before it."""
    feedback_block: int = 64
    """feedback only: tokens through which gradients flow back; they stop at the border of a block."""
    feedback_share_kv: bool = True
    """feedback only: one pair of key and value matrices for all layers; false = each layer has its own."""
    feedback_start: str = "nothing"
    """feedback only: what the first token sees: nothing (the output of attention is 0) | zeros (a window of zero
    vectors that are attended to, as published)."""
    feedback_carry: bool = False
    """feedback only: in training every row of a batch reads on where it stopped and takes its memories along, and
    documents are scored segment by segment; false = each window of `context` tokens begins with no memories."""
    segment_types: int = 0
    """encoder only: rows of a table that is added by segment (BERT has 2); 0 = no such table."""
    attention: str = "softmax"
    """An attention spec such as softmax, laser, self_adjust+window:64, softmax+selective; kept in canonical form."""
    attention_dropout: float = 0.0
    """Dropout on attention weights (meaningless with laser, which refuses it)."""
    position: str = "rope"
    """none | learned | sinusoidal (both add to the embedding) | rope (turns q and k) | alibi (biases the scores) | t5
    (a learned bias per head and distance, one table for all layers of a stack) | kerple (a learned kernel of the
    distance per head) | fire (a learned function of a distance that is stretched to the document's length) | xl
    (Transformer-XL: sinusoids of the distance, read by each layer with a matrix and two vectors of its own) |
    relative_key (feedback only: a learned vector per distance that is added to keys). See docs/positions.md."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    relative_buckets: int = 32
    """t5 only: rows of the table; half of them for keys to the right where attention looks both ways."""
    relative_max_distance: int = 128
    """t5 only: distances from here on share one bucket."""
    kerple_form: str = "log"
    """kerple only: log (-r1 log(1 + r2 distance)) | power (-r1 distance^r2)."""
    fire_hidden: int = 32
    """fire only: hidden units of the function."""
    fire_threshold: float | None = None
    """fire only: where L starts, the length from which on distances are stretched; None = a quarter of `context`."""
    xl_width: int | None = None
    """xl only: components of the sinusoid, even; each score costs so many more. None = `width`, as published."""
    memory: str = ""
    """decoder only: tokens that each layer remembers beyond its segment of `context` tokens, such as full:512, or
    last:1,long=512,short=64 (Transformer-XL; see memory/layout.py); empty = none."""
    qk_norm: bool = False
    """RMSNorm over each query and key head, before rotary; the temperatures multiply after it."""
    output_gate: str = "none"
    """A control on the attention output: none | fixed (one learned scalar per head) | head (one value per token and
    head, computed from the layer's input) | element (one per token, head and component). All start as the identity."""
    temperature_granularity: str = "head_slice"
    """How the token part reads its projection: shared (one vector over all heads, one value for all heads) | head_slice
    (a vector per head over that head's slice) | head_full (a vector per head over all heads)."""
    temperature_on: str = "query+value"
    """What gets a temperature: terms out of query, key, value joined by "+". The paper's method is query+value."""
    temperature_parts: str = "token+position"
    """token+position | token | position: tau = 1 + [tanh f(x)] + [slope * ln n]."""
    temperature_slope: str = "sigmoid"
    """sigmoid (slope = sigmoid(alpha), the paper) | linear (slope = beta, beginning at 0: exactly the identity)."""
    temperature_lr_scale: float = 10.0
    """Learning rate of the temperature parameters as a multiple of the others'. With 1 the slope hardly leaves its
    start in a short run: there the sigmoid is flat."""
    dropout: float = 0.0
    """Dropout on the embedding and on what each branch adds to the stream."""
    init: str = "standard"
    """standard (GPT-2) | xavier | small | deepscale | deepscale_simple (DeepScaleLM: very deep models) | admin |
    admin_constant (very deep Post-LN models); the last four also scale the sums. See docs/initialisation.md."""
    deepscale_k: float = 2.0
    """deepscale: what a branch adds, beta^2 = k / N^alpha; the stream keeps 1 - beta^2."""
    deepscale_alpha: float = 1.0
    """deepscale: exponent of the depth N."""
    depth_counts: str = "layers"
    """deepscale: N counts layers | blocks (residual branches, two or three a layer)."""
    deepscale_constants: str = "exact"
    """deepscale: exact (the feed-forward's own activation) | published (the ReLU value for GeLU too)."""
    deepscale_keys: str = "context"
    """deepscale: attention averages over the context's tokens | many (the published limit; bad where r0 is small)."""
    embedding_correlation: float | None = None
    """deepscale: token correlation r0 of the summed embedding before dropout; None = from the training text's token
    counts in training (the run's checkpoints say the value), from Zipf's law elsewhere."""
    admin_omega: str = "profiled"
    """admin: profiled (measured on the first batch) | predicted (closed form, no data)."""
    output_change: str = "log"
    """admin_constant: how an update may change the output with depth N: log | constant | linear."""
    omega_form: str = "buffer"
    """admin_constant: omega is a constant (buffer) | a trained vector."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def depths(self) -> dict[str, tuple[int, int]]:
        """For each stack (encoder, decoder) its layers and the residual branches of a layer."""
        if self.architecture == "seq2seq":
            return {"encoder": (self.layers, 2), "decoder": (self.decoder_depth, 3)}
        return {self.architecture: (self.layers, 2)}

    @property
    def embedding_tables(self) -> int:
        """Tables that are added into the first stream: token, position (learned or sinusoidal), segment."""
        return 1 + (self.position in ("learned", "sinusoidal")) + (self.segment_types > 0)

    @property
    def norms_embedding(self) -> bool:
        """`embedding_norm`, or the default that its docstring states."""
        if self.embedding_norm is not None:
            return self.embedding_norm
        return self.norm_placement == "post" and self.init in DEEPSCALE + ADMIN

    @cached_property
    def spec(self) -> AttentionSpec:
        """The parsed attention."""
        return AttentionSpec.parse(self.attention)

    @property
    def decoder_depth(self) -> int:
        """Blocks of a seq2seq decoder: `decoder_layers`, or `layers`."""
        return self.layers if self.decoder_layers is None else self.decoder_layers

    @property
    def key_value_heads(self) -> int:
        """`kv_heads`, or `heads`."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        """`head_dim`, or `width // heads`."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def distance_size(self) -> int:
        """`xl_width`, or `width`."""
        return self.width if self.xl_width is None else self.xl_width

    @property
    def fire_start(self) -> float:
        """`fire_threshold`, or a quarter of `context`."""
        return max(self.context / 4, 1.0) if self.fire_threshold is None else float(self.fire_threshold)

    @property
    def key_size(self) -> int:
        """Components of a query and a key as attention gets them: `head_size`, and with xl `distance_size` more."""
        return self.head_size + (self.distance_size if self.position == "xl" else 0)

    @cached_property
    def memory_layout(self) -> MemoryLayout | None:
        """The parsed memory; None = none."""
        return MemoryLayout.parse(self.memory) if self.memory else None

    @property
    def refuses_memory(self) -> str | None:
        """Why a decoder of this config cannot look back on a memory, or None."""
        if self.position in ("learned", "sinusoidal"):
            return (
                f"position={self.position} is added to the tokens, so a remembered token would carry the place of "
                f"another one; take xl, rope, alibi, t5, kerple, fire or none"
            )
        if isinstance(self.spec.weights, Performer):
            return "performer carries the whole past in its sums already and keeps no keys; leave the memory out"
        if not isinstance(self.spec.pattern, Full | Window):
            return (
                f"the pattern of attention={self.attention} counts from a document's beginning, which a memory "
                f"forgets; take a window, or leave the pattern out"
            )
        return None

    @property
    def hidden_size(self) -> int:
        """`hidden`, or the default that its docstring states."""
        if self.hidden is not None:
            return self.hidden
        return 8 * math.ceil(self.width / 3) if self.feed_forward == "swiglu" else 4 * self.width

    @property
    def temperature_targets(self) -> tuple[str, ...]:
        """`temperature_on` as a tuple, in the order query, key, value."""
        return tuple(self.temperature_on.split("+"))

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON; `from_dict` brings back an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a dict; an unknown key raises `UserError` with the nearest name, a missing one is the default."""
        check_names(cls, values)
        return cls(**values)


PRESETS: dict[str, ModelConfig] = {
    # Trains in seconds on one core: for tests and first looks.
    "tiny": ModelConfig(layers=2, width=64, heads=2, context=128),
    # Minutes on one core with bytes: the size for comparisons on a CPU.
    "small": ModelConfig(layers=4, width=128, heads=4, context=256),
    # Hours on a CPU.
    "base": ModelConfig(layers=6, width=256, heads=8, context=512),
    # The shape of GPT-2 124M; wants a GPU.
    "large": ModelConfig(layers=12, width=768, heads=12, context=1024, vocab_size=50257),
    # Does not train: for a first look at `clearhead inspect`, and at what repairs it.
    "deep-post-ln": ModelConfig(
        layers=48,
        width=64,
        heads=2,
        context=128,
        feed_forward="relu",
        norm="layer",
        norm_placement="post",
        init="xavier",
    ),
}
"""Named sizes; change single fields with `dataclasses.replace(PRESETS["small"], attention="laser")`."""
