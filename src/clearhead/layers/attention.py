"""The attention layer: projections, QK-norm, rotary, temperatures, `attend`, gate, output.

Legend: b batch, t tokens, s tokens of the source, w width, h query heads, g key/value heads, d head dim,
p = heads * head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.attention.attend import State, attend
from clearhead.attention.selective import Temperatures
from clearhead.attention.spec import AttentionSpec
from clearhead.layers.gate import FixedGate, TokenGate
from clearhead.layers.geometry import Geometry
from clearhead.layers.norms import RMS_EPS
from clearhead.layers.performer import PerformerFeatures
from clearhead.layers.position.rope import Rotation
from clearhead.layers.position.transformer_xl import RelativeXL
from clearhead.layers.temperature import LearnedTemperatures, SelectiveTemperatures


@dataclass(frozen=True, eq=False)
class Source:
    """What queries look at: keys (normed and turned) and values, [b, g, s, d], and their temperatures."""

    key: Tensor
    value: Tensor
    key_temperature: Tensor | None = None
    value_temperature: Tensor | None = None


class Attention(nn.Module):
    """output(gate(attend(q, k, v))) with q, k, v = projections of x. No biases.

    Order: project; temperatures read the bare projections; split into heads; QK-norm (RMSNorm over each head, one
    weight for all heads); rotary; `attend`, which multiplies the temperatures; gate; output matrix.
    With a cache the new keys and values are appended, keys after rotary and values after their temperature. `past` are
    tokens before x that are keys and values only (Transformer-XL's memory), as the projections read them.
    `relative` = Transformer-XL's positions in the place of rotary.

    Shapes: x [b, t, width], past [b, m, width] -> [b, t, width].
    """

    branch_output = "output"  # the matrix that writes into the residual stream; initialisations scale it

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        spec: AttentionSpec,
        qk_norm: bool = False,
        temperatures: SelectiveTemperatures | LearnedTemperatures | None = None,
        gate: FixedGate | TokenGate | None = None,
        relative: RelativeXL | None = None,
        dropout: float = 0.0,
        features: PerformerFeatures | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.spec = spec
        self.dropout = dropout
        self.query = nn.Linear(width, heads * head_dim, bias=False)
        self.key = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.value = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.query_norm = nn.RMSNorm(head_dim, eps=RMS_EPS) if qk_norm else None
        self.key_norm = nn.RMSNorm(head_dim, eps=RMS_EPS) if qk_norm else None
        self.temperatures = temperatures
        self.gate = gate
        self.features = features
        self.relative = relative
        self.output = nn.Linear(heads * head_dim, width, bias=False)

    def forward(
        self, x_btw: Tensor, geometry: Geometry, cache: State | None = None, past_bmw: Tensor | None = None
    ) -> Tensor:
        """See the class."""
        q_btp = self.query(x_btw)  # before keys and values: the order decides how gradients of x are rounded
        read_bsw = x_btw if past_bmw is None else torch.cat((past_bmw.to(x_btw.dtype), x_btw), dim=1)
        return self.look(x_btw, q_btp, self.read(read_bsw, geometry), geometry, cache)

    def read(self, x_bsw: Tensor, geometry: Geometry) -> Source:
        """Make keys and values of `x`."""
        k_bsp, v_bsp = self.key(x_bsw), self.value(x_bsw)
        taus = (None, None) if self.temperatures is None else self.temperatures.of_source(k_bsp, v_bsp, geometry)
        k_bgsd = _normed(self.key_norm, self._split(k_bsp))
        rotation = geometry.source_rotation
        if rotation is not None:
            k_bgsd = self._placed_key(k_bgsd, rotation)
        return Source(k_bgsd, self._split(v_bsp), *taus)

    def look(
        self, x_btw: Tensor, q_btp: Tensor, source: Source, geometry: Geometry, cache: State | None = None
    ) -> Tensor:
        """Let the projected queries of `x` attend to `source`, and mix the heads."""
        temperatures = None
        if self.temperatures is not None:
            tau = self.temperatures.of_query(q_btp, geometry)
            temperatures = Temperatures(tau, source.key_temperature, source.value_temperature)
        q_bhtd = _normed(self.query_norm, self._split(q_btp))
        if geometry.rotation is not None:
            q_bhtd = self._placed_query(q_bhtd, geometry.rotation)

        out_bhtd = attend(
            q_bhtd,
            source.key,
            source.value,
            self.spec,
            mask=geometry.mask,
            bias=geometry.bias,
            temperatures=temperatures,
            scale=1.0 / math.sqrt(self.head_dim),
            dropout_p=self.dropout if self.training else 0.0,
            state=cache,
            projection=None if self.features is None else self.features(),
        ).out
        if self.gate is not None:
            out_bhtd = self.gate(out_bhtd, x_btw)
        return self.output(out_bhtd.transpose(1, 2).flatten(2))

    def _placed_query(self, q_bhtd: Tensor, rotation: Rotation) -> Tensor:
        return rotation(q_bhtd) if self.relative is None else self.relative.query(q_bhtd, rotation)

    def _placed_key(self, k_bgsd: Tensor, rotation: Rotation) -> Tensor:
        return rotation(k_bgsd) if self.relative is None else self.relative.key(k_bgsd, rotation)

    def _split(self, x_btp: Tensor) -> Tensor:
        return x_btp.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _normed(norm: nn.RMSNorm | None, x_bhtd: Tensor) -> Tensor:
    """Norm in the weight's dtype (fp32 under autocast), answer in the dtype of `x`."""
    return x_bhtd if norm is None else norm(x_bhtd.to(norm.weight.dtype)).to(x_bhtd.dtype)
