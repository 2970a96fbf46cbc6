"""The decoders that the property tests run over, and the properties that encoders share with them."""

from __future__ import annotations

import pytest
import torch

SPECS = [
    "softmax",
    "bigbird:block_size=3,random_blocks=1",
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
        for spec in ("softmax", "laser", "self_adjust+window:5", "laser+bigbird:block_size=2,random_blocks=1")
    ],
    *[
        {"attention": spec, "position": "fire", "fire_hidden": 5, "fire_threshold": 3.5}
        for spec in ("softmax", "self_adjust+window:5", "laser+bigbird:block_size=2,random_blocks=1")
    ],
    {"attention": "laser+selective", "position": "kerple", "kv_heads": 2},
    {"attention": "self_adjust", "position": "kerple", "kerple_form": "power"},
    {"attention": "performer:features=16", "position": "rope", "kv_heads": 2},
    {
        "attention": "performer:kernel=relu,features=16+laser+selective",
        "position": "learned",
        "temperature_on": "value",
    },
    *[{"attention": spec, "position": "xl"} for spec in ("softmax", "laser+selective", "bigbird:block_size=3")],
    {"attention": "self_adjust+window:4", "position": "xl", "xl_width": 6, "kv_heads": 2, "qk_norm": True},
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


def packed_documents_equal_separate_ones(model, tokens):
    segments = torch.tensor([4] * 7 + [1] * 9 + [2] * 4).expand(3, -1).contiguous()
    packed = model(tokens, segments=segments)
    for first, end in ((0, 7), (7, 16), (16, 20)):
        torch.testing.assert_close(packed[:, first:end], model(tokens[:, first:end]), **TOLERANCE)


def padding_is_invisible(model, tokens, side):
    lengths = [20, 13, 1]
    valid = torch.zeros(3, 20, dtype=torch.bool)
    padded = torch.randint(0, 31, (3, 20), generator=torch.Generator().manual_seed(5))
    for row, length in enumerate(lengths):
        place = slice(20 - length, 20) if side == "left" else slice(0, length)
        padded[row, place] = tokens[row, :length]
        valid[row, place] = True
    logits = model(padded, valid=valid)
    assert logits.isfinite().all()
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, :length])
        torch.testing.assert_close(logits[row][valid[row]], alone[0], **TOLERANCE)
