"""Temperatures on queries, keys and values: a scale before the scores (Selective Self-Attention, arXiv 2411.12892,
Def. 1).

    Q = tau_q * X W_q      K = tau_k * X W_k      V = tau_v * X W_v      O = softmax(Q K^T / sqrt(d)) V

tau is an *inverse* temperature: larger is sharper. The paper's final form scales queries and values only, because a
scale on a query never reorders its keys. How tau comes from a token is a layer's business (`layers/temperature.py`);
here it is a tensor. Scaling the query, not the scores, keeps the fused kernels in play.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Temperatures:
    """Inverse temperatures of one call: `query` [b, h, n, 1] (or [b, h, n]); `key`, `value` [b, g, m, 1] (or [b, g,
    m]).

    Any dimension may be 1 and is then broadcast.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None


def selective(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_temperature: Tensor | None = None,
    key_temperature: Tensor | None = None,
    value_temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query [b,h,n,d], key and value [b,g,m,d], each times its inverse temperature where one is given.

    The product is taken in the temperature's dtype, at least the tensor's own, and cast back to the tensor's dtype, so
    that a float32 temperature neither loses precision nor turns a bf16 query into float32.

    Raises `ValueError` when a temperature does not broadcast to its tensor without the last dimension.
    """
    return (
        _scaled("query", query, query_temperature),
        _scaled("key", key, key_temperature),
        _scaled("value", value, value_temperature),
    )


def _scaled(name: str, x: Tensor, temperature: Tensor | None) -> Tensor:
    if temperature is None:
        return x
    tau = temperature.unsqueeze(-1) if temperature.dim() == 3 else temperature
    wanted = (*x.shape[:3], 1)
    if tau.dim() != 4 or any(have not in (1, want) for have, want in zip(tau.shape, wanted, strict=True)):
        raise ValueError(
            f"{name}_temperature: expected a shape that broadcasts to {wanted} (or without the last 1), "
            f"got {tuple(temperature.shape)}"
        )
    return (x * tau).to(x.dtype)
