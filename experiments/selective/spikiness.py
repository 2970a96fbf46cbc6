"""Two numbers of a trained model: how spiky its attention maps are, and how large W_q W_k^T is.

Spikiness of a row of weights over n keys: (sum of weights) / (n * sum of squares), 1 where it is flat, 1/n where one
key has all: *smaller is spikier*, as the paper defines it.

Legend: b batch, h heads, n queries, m keys, w width, d head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.attention.call import Call
from clearhead.attention.extras import measure
from clearhead.attention.observe import watching
from clearhead.layers.attention import Attention


def spikiness(weights: Tensor, visible: Tensor) -> Tensor:
    """Of each row, [...]: weights [..., m], visible [...] the number of keys it sees."""
    return weights.sum(dim=-1) / (visible * weights.square().sum(dim=-1))


@torch.no_grad()
def of_maps(model: nn.Module, tokens_bt: Tensor) -> dict[str, float]:
    """Means over layers, heads, sequences and rows that see two keys or more: spikiness, largest weight, and the
    entropy as a share of ln n."""
    sums = dict.fromkeys(("spikiness", "max_weight", "entropy_share"), 0.0)
    rows = 0

    def look(call: Call) -> None:
        nonlocal rows
        found = measure(call, ("weights", "max_weight", "entropy", "visible"))
        visible_bhn = found["visible"].expand(found["max_weight"].shape).double()
        counts = visible_bhn > 1
        weights_bhnm = found["weights"].double()
        sums["spikiness"] += float(spikiness(weights_bhnm, visible_bhn)[counts].sum())
        sums["max_weight"] += float(found["max_weight"].double()[counts].sum())
        sums["entropy_share"] += float((found["entropy"].double() / visible_bhn.log())[counts].sum())
        rows += int(counts.sum())

    was = model.training
    model.eval()
    with watching(look):
        model(tokens_bt)
    model.train(was)
    return {name: value / rows for name, value in sums.items()}


def norms(model: nn.Module) -> list[float]:
    """The operator norm of W_q W_k^T of every head of every layer, without any temperature."""
    found = []
    for layer in model.modules():
        if not isinstance(layer, Attention):
            continue
        query_hdw, key_gdw = (
            matrix.weight.detach().double().unflatten(0, (-1, layer.head_dim)) for matrix in (layer.query, layer.key)
        )
        key_hdw = key_gdw.repeat_interleave(len(query_hdw) // len(key_gdw), dim=0)
        product_hww = query_hdw.transpose(1, 2) @ key_hdw
        found += torch.linalg.matrix_norm(product_hww, ord=2).tolist()
    return found


def of_model(model: nn.Module, tokens_bt: Tensor) -> dict[str, Any]:
    """`of_maps`, and the mean of `norms`."""
    each = norms(model)
    return of_maps(model, tokens_bt) | {"norm": sum(each) / len(each)}
