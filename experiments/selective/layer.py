"""One head of the package's own attention layer, reading a set of tokens for a query: the toy of two parts.

Legend: b batch, n tokens that are read, w width, d head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.attention.call import Call
from clearhead.attention.extras import measure
from clearhead.attention.mask import Mask
from clearhead.attention.observe import watching
from clearhead.layers.attention import Attention
from clearhead.layers.geometry import Geometry
from clearhead.models.build import build_temperatures
from clearhead.models.config import ModelConfig


class OneLayer(nn.Module):
    """Attention of one query over n tokens: source [b, n, w], query [b, 1, w] -> [b, w].

    Positions count only where a temperature counts them: the query sees n keys, value number i has position i.
    """

    def __init__(self, width: int, head_dim: int, options: dict[str, Any], seed: int) -> None:
        super().__init__()
        config = ModelConfig(width=width, heads=1, head_dim=head_dim, position="none", **options)
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # matrices are drawn before temperatures, which start from fixed values
            self.attention = Attention(width, 1, 1, head_dim, spec=config.spec, temperatures=build_temperatures(config))

    def forward(self, source_bnw: Tensor, query_b1w: Tensor) -> Tensor:
        """See the class."""
        n = source_bnw.shape[1]
        geometry = Geometry(torch.arange(n)[None], Mask(), visible=torch.full((1, 1, 1), n))
        read = self.attention.read(source_bnw, geometry)
        return self.attention.look(query_b1w, self.attention.query(query_b1w), read, geometry)[:, 0]

    def looked(self, source_bnw: Tensor, query_b1w: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The output, and of the query's row "weights" [b, n], "entropy" and "max_weight" [b]; without gradients."""
        found: dict[str, Tensor] = {}

        def look(call: Call) -> None:
            found.update({name: x[:, 0, 0] for name, x in measure(call, ("weights", "entropy", "max_weight")).items()})

        with torch.no_grad(), watching(look):
            return self(source_bnw, query_b1w), found

    def norm(self) -> float:
        """The operator norm of W_q W_k^T, without any temperature."""
        product = self.attention.query.weight.T @ self.attention.key.weight
        return float(torch.linalg.matrix_norm(product.detach(), ord=2))

    def slopes(self) -> dict[str, float]:
        """The position part's slope of query and value, where there is one."""
        found = {}
        for name in ("query", "value"):
            part = getattr(getattr(self.attention.temperatures, name, None), "position", None)
            if part is not None:
                found[name] = float(torch.sigmoid(part.slope.detach())[0])
        return found
