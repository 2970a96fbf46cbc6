"""The parts of a transformer, as references into the user's own model. Nothing here changes the model.

`anatomy_of(model)` (clearhead.anatomy.find) names them for our models, Hugging Face, timm and torch.nn.Transformer*.
The measurement, the prediction from weights, and the initialisations all read this one description.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn as nn
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Matrix:
    """A linear map [out, in] that is the whole of a parameter, or a part of a fused one."""

    module: nn.Module
    path: str
    """Path of the module in the model; the parameter is `path.leaf`. All paths count from `Anatomy.model`."""
    leaf: str = "weight"
    bias_leaf: str | None = "bias"
    """Name of the bias on the module; None when there is none."""
    rows: tuple[int, int] | None = None
    """Part [start, stop) of the output dimension of a fused matrix (QKV); None = all."""
    transposed: bool = False
    """The parameter is stored [in, out] (Hugging Face's Conv1D)."""
    interleaved: tuple[int, int, int] | None = None
    """(heads, parts, part): a fused matrix whose output dimension is [heads, parts, head_dim] (GPT-NeoX, BLOOM)."""
    span: int = 1
    """Interleaved only: how many neighbouring parts, from `part` on, belong to this map (Falcon's grouped queries)."""

    @property
    def parameter_name(self) -> str:
        """The parameter's name in `model.named_parameters()`."""
        return f"{self.path}.{self.leaf}" if self.path else self.leaf

    @property
    def bias_name(self) -> str | None:
        """The bias's name in `model.named_parameters()`; None when there is none."""
        if self.bias_leaf is None or getattr(self.module, self.bias_leaf, None) is None:
            return None
        return f"{self.path}.{self.bias_leaf}" if self.path else self.bias_leaf

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(out, in) of this part; read once, because a thousand layers ask for it often."""
        out, into = self.weight().shape
        return int(out), int(into)

    def weight(self) -> Tensor:
        """This part as [out, in]. A view of the parameter unless it is interleaved (then a copy): `write` writes."""
        return self.of(getattr(self.module, self.leaf))

    def bias(self) -> Tensor | None:
        """The same rows of the bias, or None."""
        bias = None if self.bias_leaf is None else getattr(self.module, self.bias_leaf, None)
        return None if bias is None else self._part(bias).flatten()

    def of(self, whole: Tensor) -> Tensor:
        """This part, [out, in], of any tensor that is shaped like the parameter: its gradient, an optimizer's state."""
        part = self._part(whole.t() if self.transposed else whole)
        return part.flatten(0, -2)

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Make `weight`, [out, in], this part of the model's parameter; other parts stay. Raises on another shape."""
        whole = getattr(self.module, self.leaf)
        _fill(self._part(whole.t() if self.transposed else whole), weight, self.shape, self.parameter_name)

    @torch.no_grad()
    def write_bias(self, bias: Tensor) -> None:
        """Make `bias`, [out], this part of the model's bias. Raises where there is none, or on another shape."""
        if self.bias_leaf is None or getattr(self.module, self.bias_leaf, None) is None:
            raise ValueError(f"{self.parameter_name}: there is no bias to write")
        part = self._part(getattr(self.module, self.bias_leaf))
        _fill(part, bias, (part.numel(),), f"the bias of {self.parameter_name}")

    def _part(self, whole: Tensor) -> Tensor:
        """A view, [out, ...] or, interleaved, [heads, (span,) head_dim, ...]."""
        if self.interleaved is not None:
            heads, parts, part = self.interleaved
            return whole.unflatten(0, (heads, parts, -1))[:, part : part + self.span]
        return whole if self.rows is None else whole[self.rows[0] : self.rows[1]]


def _fill(view: Tensor, values: Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(values.shape) != shape:
        raise ValueError(f"{name}: expected values of shape {shape}, got {tuple(values.shape)}")
    view.copy_(values.reshape(view.shape))


@dataclass(frozen=True, eq=False)
class AttentionParts:
    """One attention."""

    module: nn.Module
    path: str
    query: Matrix
    key: Matrix
    value: Matrix
    output: Matrix
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    cross: bool = False
    scale: float | None = None
    """On the scores; None = 1 / sqrt(head_dim)."""
    dropout: float = 0.0
    rope_base: float | None = None
    """Base of the rotary frequencies; None = no rotary positions."""
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None
    spec: str = "softmax"


@dataclass(frozen=True, eq=False)
class FeedForwardParts:
    """One feed-forward: down(act(up x)), or down(act(gate x) * up x) when there is a gate."""

    module: nn.Module
    path: str
    activation: str
    """relu | gelu | gelu_tanh | silu | another name as the model gives it."""
    up: Matrix
    down: Matrix
    gate: Matrix | None = None
    dropout: float = 0.0


@dataclass(frozen=True, eq=False)
class SubLayerParts:
    """A branch with its norm and its place on the residual stream."""

    part: str
    """attention | cross_attention | feed_forward."""
    branch: AttentionParts | FeedForwardParts
    norm: nn.Module | None
    norm_path: str | None
    placement: str
    """pre: the norm reads the stream and feeds the branch | post: the norm reads the sum."""
    dropout: float = 0.0
    """On the branch, before it is added."""
    rule: nn.Module | None = None
    """Our models: the module that adds (`clearhead.layers.residual`)."""
    residual_module: nn.Module | None = None
    """Others: the module whose forward receives (branch input, stream) and adds them, as BERT's `BertSelfOutput`; None
    when the sum stands in a forward that cannot be reached."""
    branch_norm: nn.Module | None = None
    """A further norm on what the branch answers, before it is added (Gemma 2 and 3, OLMo 2)."""
    branch_norm_path: str | None = None


@dataclass(frozen=True, eq=False)
class BlockParts:
    """One layer."""

    module: nn.Module
    path: str
    sublayers: tuple[SubLayerParts, ...]
    parallel: bool = False


@dataclass(frozen=True, eq=False)
class EmbeddingParts:
    """One table that is added into the first stream."""

    module: nn.Module
    path: str
    leaf: str
    role: str
    """token | position | segment."""


@dataclass(frozen=True, eq=False)
class StackParts:
    """An encoder or a decoder."""

    name: str
    """encoder | decoder. A model of a single stack: decoder when causal, else encoder."""
    blocks: tuple[BlockParts, ...]
    embeddings: tuple[EmbeddingParts, ...]
    embedding_norm: nn.Module | None
    embedding_norm_path: str | None
    embedding_dropout: float
    embedding_scale: float
    final_norm: nn.Module | None
    final_norm_path: str | None
    batch_first: bool = True
    """Activations are [batch, tokens, width]; False = [tokens, batch, width], the default of torch.nn.Transformer*."""


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of `model`."""

    model: nn.Module
    """The model itself, out of any wrapper of DDP or torch.compile."""
    family: str
    """clearhead | the Hugging Face model_type | timm | torch | unknown (found by structure alone)."""
    stacks: tuple[StackParts, ...]
    width: int
    head: Matrix | None
    head_tied: bool
    """The head's weight is the token table."""
    head_scale: float = 1.0
    unknown: tuple[str, ...] = field(default=())
    """Parameters that play no part named here (a relative position table, a pooler ...), by name."""
    notes: tuple[str, ...] = ()
    """What was assumed, not read: one sentence each."""

    @property
    def attentions(self) -> tuple[AttentionParts, ...]:
        """Every attention, in the order of the computation."""
        return tuple(
            sublayer.branch
            for stack in self.stacks
            for block in stack.blocks
            for sublayer in block.sublayers
            if isinstance(sublayer.branch, AttentionParts)
        )
