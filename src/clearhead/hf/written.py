"""Scores written out, N x M in memory: for what changes scores in a way that no fused or chunked kernel knows.

    softcap     x <- c tanh(x / c)
    sinks       one more logit s[h] in each row, with the value 0:  w_k = exp(x_k) / (exp(s) + sum_l exp(x_l))

`attend` then gets queries and keys of zeros with the scores as a bias (and a sink as one more key), so that weights,
read and gradients are the same code as ever. Shapes: b batch, h query heads, g key/value heads, n queries, m keys,
d head dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from clearhead.attention.attend import AttentionOutput, attend
from clearhead.attention.bias import DenseBias
from clearhead.attention.mask import Mask
from clearhead.attention.precision import working_dtype
from clearhead.attention.selective import Temperatures, selective
from clearhead.attention.spec import AttentionSpec, Full, Laser, Performer, Softmax


def refuse(spec: AttentionSpec, softcap: float | None, sinks: Tensor | None) -> str | None:
    """Why the spec cannot stand in where scores are capped or a row has a sink; None when it can."""
    what = "caps its scores by a tanh" if softcap is not None else "has a sink in each row"
    if isinstance(spec.weights, Performer):
        return f"the layer {what}, and performer never makes a score"
    if sinks is None:
        return None
    if isinstance(spec.read, Laser):
        return (
            f"the layer {what}, so that its weights sum to less than 1, and LASER reads log(A exp V), which needs rows "
            f"that sum to 1: a shift of the values would change the result"
        )
    if not isinstance(spec.weights, Softmax):
        return f"the layer {what}, and {spec.weights.name} weights with one more logit are defined nowhere"
    return None


def attend_written(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec,
    *,
    mask: Mask,
    bias: Tensor | None,
    temperatures: Temperatures | None,
    scale: float | None,
    dropout_p: float,
    softcap: float | None,
    sinks: Tensor | None,
    want: tuple[str, ...],
) -> AttentionOutput:
    """As `attend`, on scores that are capped, or rows with a sink. `bias` is a tensor, added before the cap as after
    the model's own: after it."""
    if temperatures is not None:
        query, key, value = selective(
            query, key, value, query_temperature=temperatures.query, key_temperature=temperatures.key,
            value_temperature=temperatures.value,
        )  # fmt: skip
    b, h, n, d = query.shape
    g, m = key.shape[1:3]
    dtype = working_dtype(query.dtype)
    grouped = query.unflatten(1, (g, h // g)).to(dtype)
    scores = torch.matmul(grouped, key.unsqueeze(2).transpose(-1, -2).to(dtype)).flatten(1, 2)
    scores = scores * (d**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)
    # The pattern is applied here: a sink would shift the columns that it speaks of.
    seen = spec.pattern.within(mask, h, m).dense_tensor(n, m, query.device)
    spec = replace(spec, pattern=Full(), temperature=None)
    if sinks is not None:
        sink = sinks.to(dtype).view(1, -1, 1, 1).expand(b, h, n, 1)
        scores = torch.cat([scores, sink], dim=-1)
        seen = None if seen is None else F.pad(seen, (0, 1), value=True)
        value = F.pad(value, (0, 0, 0, 1))
    zero_q, zero_k = query.new_zeros(b, h, n, 1), key.new_zeros(b, g, value.shape[2], 1)
    answer = attend(
        zero_q, zero_k, value, spec, mask=Mask() if seen is None else Mask.dense(seen), bias=DenseBias(scores),
        scale=1.0, dropout_p=dropout_p, want=want,
    )  # fmt: skip
    if sinks is not None and "weights" in answer.extras:
        answer.extras["weights"] = answer.extras["weights"][..., :m]
    return answer
