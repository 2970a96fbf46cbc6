"""What the theory needs to know of a model, in plain numbers: sizes, weight variances, constants. Imports no torch.

`clearhead.signal.describe` makes a skeleton from a config (variances that the initialisation asks for) or from a model
(variances that its weights have). `clearhead.signal.predict` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Matrix:
    """A linear map, y = x W^T + b."""

    fan_in: int
    fan_out: int
    variance: float
    """Mean square of the entries of W."""
    bias_variance: float = 0.0
    """Mean square of the entries of b."""


@dataclass(frozen=True)
class Norm:
    """A LayerNorm or RMSNorm, followed by its gain and shift."""

    kind: str
    """layer | rms."""
    gain: float = 1.0
    """Mean square of the weight."""
    shift: float = 0.0
    """Mean square of the bias."""
    eps: float = 1e-5


@dataclass(frozen=True)
class AttentionShape:
    """One attention, without its norm and residual."""

    heads: int
    kv_heads: int
    head_dim: int
    query: Matrix
    key: Matrix
    value: Matrix
    output: Matrix
    causal: bool
    spec: str = "softmax"
    """An attention spec; see `clearhead.attention.spec`."""
    scale: float | None = None
    """On the scores; None = 1 / sqrt(head_dim)."""
    dropout: float = 0.0
    """On the attention weights."""
    rope_base: float | None = None
    """Base of the rotary frequencies; None = no rotary positions."""
    qk_norm: bool = False
    cross: bool = False
    """Keys and values come from the other stack."""


@dataclass(frozen=True)
class FeedForwardShape:
    """One feed-forward: down(act(up x)), or down(act(gate x) * up x) when there is a gate."""

    activation: str
    """relu | gelu | gelu_tanh | silu."""
    up: Matrix
    down: Matrix
    gate: Matrix | None = None
    dropout: float = 0.0
    """On the hidden activation."""


@dataclass(frozen=True)
class SubLayer:
    """A branch on the residual stream: stream_scale * x + branch_scale * dropout(branch)."""

    part: str
    """attention | cross_attention | feed_forward."""
    branch: AttentionShape | FeedForwardShape
    norm: Norm | None
    placement: str
    """pre | post."""
    stream_scale: float | None = 1.0
    """Root mean square, for a vector; None = Admin's omega, found on the way as a profile pass would find it."""
    branch_scale: float = 1.0
    dropout: float = 0.0
    branch_norm: Norm | None = None
    """A norm on what the branch answers, before dropout (Gemma 2)."""


@dataclass(frozen=True)
class Embedding:
    """The sum of tables (token, position, segment), then norm and dropout."""

    variances: tuple[float, ...]
    """Mean square of each table's entries, the token table first."""
    correlations: tuple[float, ...]
    """For each table, the probability that two tokens of a sequence share a row: sum p^2, 0 for positions."""
    norm: Norm | None = None
    dropout: float = 0.0
    scale: float = 1.0
    """The token table's rows are multiplied by this."""


@dataclass(frozen=True)
class Stack:
    """An encoder or a decoder."""

    name: str
    """encoder | decoder."""
    embedding: Embedding
    layers: tuple[tuple[SubLayer, ...], ...]
    final_norm: Norm | None
    parallel: bool = False
    """Attention and feed-forward of a layer read the same input (GPT-J, GPT-NeoX)."""


@dataclass(frozen=True)
class Skeleton:
    """A whole model. Two stacks: the encoder first, the decoder reads its output."""

    stacks: tuple[Stack, ...]
    width: int
    tokens: int
    """Length of the sequences."""
    head: Matrix | None
    """The map to logits."""
    head_scale: float = 1.0
    """Multiplies the hidden state before the head."""
    training: bool = True
    """Whether dropout is on."""
    notes: tuple[str, ...] = ()
    """What the description left out or assumed."""
