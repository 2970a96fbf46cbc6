"""The attention layer: projections, QK-norm, rotary, temperatures, `attend`, gate, output.

Legend: b batch, t tokens, w width, h query heads, g key/value heads, d head dim, p = heads * head dim.
"""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from clearhead.attention.attend import attend
from clearhead.attention.spec import AttentionSpec
from clearhead.layers.gate import FixedGate, TokenGate
from clearhead.layers.geometry import Geometry
from clearhead.layers.norms import RMS_EPS
from clearhead.layers.temperature import LearnedTemperatures, SelectiveTemperatures
from clearhead.memory.cache import KVCache


class Attention(nn.Module):
    """output(gate(attend(q, k, v))) with q, k, v = projections of x. No biases.

    Order: project; temperatures read the bare projections; split into heads; QK-norm (RMSNorm over each head, one
    weight for all heads); rotary; `attend`, which multiplies the temperatures; gate; output matrix.
    With a cache the new keys and values are appended, keys after rotary and values after their temperature.

    Shapes: x [b, t, width] -> [b, t, width].
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
        dropout: float = 0.0,
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
        self.output = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x_btw: Tensor, geometry: Geometry, cache: KVCache | None = None) -> Tensor:
        """See the class."""
        q_btp, k_btp, v_btp = self.query(x_btw), self.key(x_btw), self.value(x_btw)
        temperatures = None
        if self.temperatures is not None:
            temperatures = self.temperatures(q_btp, k_btp, v_btp, geometry)

        q_bhtd = _normed(self.query_norm, self._split(q_btp))
        k_bgtd = _normed(self.key_norm, self._split(k_btp))
        v_bgtd = self._split(v_btp)
        if geometry.rotation is not None:
            q_bhtd, k_bgtd = geometry.rotation(q_bhtd), geometry.rotation(k_bgtd)

        out_bhtd = attend(
            q_bhtd,
            k_bgtd,
            v_bgtd,
            self.spec,
            mask=geometry.mask,
            bias=geometry.bias,
            temperatures=temperatures,
            dropout_p=self.dropout if self.training else 0.0,
            state=cache,
        ).out
        if self.gate is not None:
            out_bhtd = self.gate(out_bhtd, x_btw)
        return self.output(out_bhtd.transpose(1, 2).flatten(2))

    def _split(self, x_btp: Tensor) -> Tensor:
        return x_btp.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _normed(norm: nn.RMSNorm | None, x_bhtd: Tensor) -> Tensor:
    """Norm in the weight's dtype (fp32 under autocast), answer in the dtype of `x`."""
    return x_bhtd if norm is None else norm(x_bhtd.to(norm.weight.dtype)).to(x_bhtd.dtype)
