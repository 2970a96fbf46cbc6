"""What a model of transformers passes to its attention beside queries, keys, values and mask.

Each keyword is handled, or known to change nothing, or refused with the layer's name: a keyword that is dropped changes
a model without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clearhead.attention.bias import Bias
from clearhead.errors import UserError

HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "logits_to_keep",
        "num_items_in_batch",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "seq_idx",
        "use_cache",
    }
)
"""They say what is done before or after the attention: rotary positions and the cache have been applied by then, and
packed documents are in the mask."""


@dataclass(frozen=True, eq=False)
class Asked:
    """The keywords that change the attention. Shapes: b batch, h query heads, n queries, m keys, s documents."""

    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    """[h]: one more logit in the denominator of each row."""
    position_bias: Tensor | Bias | None = None
    """Broadcastable to [b, h, n, m], added to the scores; stand-ins (`replace/`) also pass a `Bias`."""
    query_ends: Tensor | None = None
    """[s + 1]: where packed documents begin and end among the queries."""
    key_ends: Tensor | None = None
    weights: bool = False
    """`output_attentions`."""


_TABLE = {
    "sliding_window": "sliding_window",
    "softcap": "softcap",
    "s_aux": "sinks",
    "position_bias": "position_bias",
    "cu_seq_lens_q": "query_ends",
    "cu_seq_lens_k": "key_ends",
    "output_attentions": "weights",
}
_LENGTHS = ("max_length_q", "max_length_k")  # of the longest document: the ends say it already


def read(keywords: Mapping[str, Any], layer: str) -> Asked:
    """Sort a call's keywords; `UserError` names the layer and a keyword that is not handled."""
    values: dict[str, Any] = {}
    for name, value in keywords.items():
        if name in _TABLE:
            values[_TABLE[name]] = value
        elif value is not None and name not in HARMLESS and name not in _LENGTHS and not name.startswith("output_"):
            _refuse(name, layer)
    values["weights"] = bool(values.get("weights", False))
    return Asked(**values)


def given(keywords: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the keywords that change the attention, for the report."""
    return tuple(
        name for name, value in keywords.items() if name in _TABLE and value is not None and value is not False
    )


def _refuse(name: str, layer: str) -> None:
    raise UserError(
        f"{layer}: its model passes {name}= to the attention, which is not handled here; without it the attention "
        f"would not be the model's own, so the layer cannot be patched"
    )
