"""Selective Self-Attention's temperatures (arXiv 2411.12892, section 3), and the learned-scalar control.

    tau(x) = 1 + tanh(f(x)) + slope * ln n          f(x) = vector . GELU(projection of x)

tau multiplies queries (or keys, values) before the scores: an inverse temperature, larger is sharper. The two parts are
added. f re-uses the layer's own projection ("weight sharing", the paper's section 3 and appendix A), so the token part
costs one vector per head and one slope. What the paper leaves open, and what is done here:

- f reads the projection as it leaves its matrix: before rotary (after it, f would depend on the position) and before
  QK-norm. tau is applied after QK-norm, which would cancel it, and after rotary, with which it commutes.
- n is, for a query, the number of keys it sees (its position, counted from 1, when attention is causal and full; the
  window's size once a window is full), and for a key or value its own position in its document, counted from 1. Where
  attention looks both ways (ours; the paper is causal) a position says nothing about how many keys compete, so n is the
  number of visible keys for keys and values too; in cross attention it is the length of the source.
- The length of the vector: `granularity`. One slope per layer and projection, as one trainable scalar in the paper.
- Starts: neither is in the paper. The vector starts at 0 (tanh'(0) = 1, so its gradient lives); alpha starts where the
  authors' released GPT-2 code starts, at a slope of exp(-exp(1.5)) = 0.0113, alpha = -4.47.

Legend: b batch, t tokens, h heads, d head dim. Logarithm and tanh are taken in fp32 or better.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clearhead.attention.selective import Temperatures
from clearhead.layers.geometry import Geometry

# The released GPT-2 code uses exp(-exp(beta)) in the place of sigmoid(alpha), and starts beta at 1.5.
START_SLOPE = math.exp(-math.exp(1.5))
START_ALPHA = math.log(START_SLOPE / (1.0 - START_SLOPE))


class TokenPart(nn.Module):
    """tanh(vector . GELU(projection)), [b, t, heads * head_dim] -> [b, h, t]; h is 1 for "shared".

    shared: one vector over all heads, one value for all of them | head_slice: a vector per head over its own slice |
    head_full: a vector per head over all heads.
    """

    def __init__(self, heads: int, head_dim: int, granularity: str) -> None:
        super().__init__()
        shapes = {
            "shared": (1, heads * head_dim),
            "head_slice": (heads, head_dim),
            "head_full": (heads, heads * head_dim),
        }
        if granularity not in shapes:
            raise ValueError(f"granularity: expected one of {', '.join(shapes)}, got {granularity!r}")
        self.granularity = granularity
        self.vector = nn.Parameter(torch.zeros(shapes[granularity]))

    def start_values(self) -> dict[str, float]:
        """Start of each parameter."""
        return {"vector": 0.0}

    def forward(self, projection_btp: Tensor) -> Tensor:
        """See the class."""
        vector_hp: Tensor = self.vector
        if self.granularity == "head_slice":  # one product with zeros between heads is faster than one per head
            vector_hp = torch.block_diag(*self.vector)
        hidden_btp = F.gelu(projection_btp)
        if hidden_btp.dtype != vector_hp.dtype and not torch.is_autocast_enabled(hidden_btp.device.type):
            wide = torch.promote_types(hidden_btp.dtype, vector_hp.dtype)  # fp32 temperatures beside bf16 weights
            hidden_btp, vector_hp = hidden_btp.to(wide), vector_hp.to(wide)
        f_bth = F.linear(hidden_btp, vector_hp)
        return torch.tanh(_wide(f_bth)).transpose(1, 2)


class PositionPart(nn.Module):
    """slope * ln n, [1|b, 1|h, t] counts -> the same shape.

    sigmoid: slope = sigmoid(alpha), always above 0 (the paper) | linear: slope = beta from 0, exactly no effect at the
    start (a form in the authors' code).
    """

    def __init__(self, slope: str) -> None:
        super().__init__()
        if slope not in ("sigmoid", "linear"):
            raise ValueError(f"slope: expected 'sigmoid' or 'linear', got {slope!r}")
        self.rule = slope
        # One element and not a scalar: FSDP2 shards dimension 0.
        self.slope = nn.Parameter(torch.full((1,), self.start_values()["slope"]))

    def start_values(self) -> dict[str, float]:
        """Start of each parameter."""
        return {"slope": START_ALPHA if self.rule == "sigmoid" else 0.0}

    def forward(self, count: Tensor) -> Tensor:
        """See the class."""
        slope = _wide(self.slope)
        if self.rule == "sigmoid":
            slope = torch.sigmoid(slope)
        # A padded query sees no key, n = 0: it counts as 1, its output is 0 whatever its temperature.
        return slope * torch.log(count.clamp_min(1).to(slope.dtype))


class Selective(nn.Module):
    """tau for one projection: 1 + the parts that are on. [b, t, heads * head_dim] -> [b, h, t, 1] in fp32 or better."""

    def __init__(self, heads: int, head_dim: int, *, granularity: str, parts: str, slope: str) -> None:
        super().__init__()
        self.heads = heads
        names = parts.split("+")
        if parts not in ("token+position", "token", "position"):
            raise ValueError(f"parts: expected 'token+position', 'token' or 'position', got {parts!r}")
        self.token = TokenPart(heads, head_dim, granularity) if "token" in names else None
        self.position = PositionPart(slope) if "position" in names else None

    def forward(self, projection_btp: Tensor, count: Tensor) -> Tensor:
        """See the class."""
        tau: Tensor | float = 1.0
        if self.token is not None:
            tau = tau + self.token(projection_btp)
        if self.position is not None:
            tau = tau + self.position(count)
        assert isinstance(tau, Tensor)
        return tau.expand(projection_btp.shape[0], self.heads, -1).unsqueeze(-1)


class SelectiveTemperatures(nn.Module):
    """The temperatures of one attention layer: a `Selective` for each of query, key and value that has one."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        on: tuple[str, ...] = ("query", "value"),
        granularity: str = "head_slice",
        parts: str = "token+position",
        slope: str = "sigmoid",
    ) -> None:
        super().__init__()

        def make(name: str, count: int) -> Selective | None:
            if name not in on:
                return None
            return Selective(count, head_dim, granularity=granularity, parts=parts, slope=slope)

        self.query = make("query", heads)
        self.key = make("key", kv_heads)
        self.value = make("value", kv_heads)

    def of_query(self, q_btp: Tensor, geometry: Geometry) -> Tensor | None:
        """tau of the queries, [b, h, t, 1]."""
        assert geometry.visible is not None
        return None if self.query is None else self.query(q_btp, geometry.visible)

    def of_source(self, k_btp: Tensor, v_btp: Tensor, geometry: Geometry) -> tuple[Tensor | None, Tensor | None]:
        """tau of keys and values, each [b, g, t, 1]."""
        own_b1t = geometry.positions[:, None, :] + 1 if geometry.own is None else geometry.own
        return (
            None if self.key is None else self.key(k_btp, own_b1t),
            None if self.value is None else self.value(v_btp, own_b1t),
        )

    def forward(self, q_btp: Tensor, k_btp: Tensor, v_btp: Tensor, geometry: Geometry) -> Temperatures:
        """See the class."""
        return Temperatures(self.of_query(q_btp, geometry), *self.of_source(k_btp, v_btp, geometry))


class LearnedTemperatures(nn.Module):
    """The control: one learned scalar per query head, the same for every token, starting at 1."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(heads))

    def start_values(self) -> dict[str, float]:
        """Start of each parameter."""
        return {"scale": 1.0}

    def of_query(self, q_btp: Tensor, geometry: Geometry) -> Tensor | None:
        """tau of the queries, [1, h, 1, 1]."""
        return _wide(self.scale)[None, :, None, None]

    def of_source(self, k_btp: Tensor, v_btp: Tensor, geometry: Geometry) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values have none."""
        return None, None

    def forward(self, q_btp: Tensor, k_btp: Tensor, v_btp: Tensor, geometry: Geometry) -> Temperatures:
        """See the class."""
        return Temperatures(query=self.of_query(q_btp, geometry))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
