"""The decoders that the property tests run over."""

from __future__ import annotations

import pytest

SPECS = [
    "softmax",
    "laser",
    "self_adjust",
    "softmax+selective",
    "laser+selective+window:5",
    "self_adjust+selective",
    "self_adjust+window:4+learned",
]
POSITIONS = ["none", "learned", "sinusoidal", "rope", "alibi"]
# Every spec and every position at least once, with the options that cross them.
CASES = [
    *[{"attention": spec, "position": "rope"} for spec in SPECS],
    *[{"attention": "softmax+selective", "position": position, "kv_heads": 2} for position in POSITIONS],
    *[
        {"attention": spec, "position": "t5", "relative_buckets": 6, "relative_max_distance": 9}
        for spec in ("softmax", "laser", "self_adjust+window:5")
    ],
    {"attention": "softmax", "position": "learned", "embedding_norm": True, "norm_placement": "post"},
    {"attention": "laser+selective", "position": "alibi", "qk_norm": True, "norm_placement": "post", "norm": "layer"},
    {
        "attention": "self_adjust+selective",
        "position": "learned",
        "kv_heads": 1,
        "qk_norm": True,
        "output_gate": "head",
        "temperature_on": "query+key+value",
        "temperature_granularity": "head_full",
        "head_dim": 10,
        "tie_embeddings": False,
    },
]
IDS = [" ".join(str(value) for value in case.values()) for case in CASES]
every_case = pytest.mark.parametrize("case", CASES, ids=IDS)

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
