"""What a position part counts, against counting by hand over the mask."""

from __future__ import annotations

import pytest
import torch

from clearhead.attention.mask import Mask
from clearhead.attention.spec import AttentionSpec
from clearhead.hf.counts import query_counts, value_counts

SPEC = AttentionSpec.parse("softmax+selective")
CPU = torch.device("cpu")


def counted(mask: Mask, n: int, m: int, role: str = "causal", heads: int = 2, **more: object) -> torch.Tensor:
    seen = query_counts(SPEC, mask, heads, n, m, CPU)
    return value_counts(role, seen, mask, n, m, 2, **more).expand(-1, -1, m)[:, 0]  # type: ignore[arg-type]


def dense(mask: Mask, n: int, m: int) -> Mask:
    whole = mask.dense_tensor(n, m, CPU)
    assert whole is not None
    return Mask.dense(whole)


LENGTH = 9
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [-1, -1, 3, 3, 3, 3, 4, 4, -1]])
PLACES = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4, 1, 2, 0]])
PADDED = Mask.key_range(torch.tensor([0, 3]), torch.tensor([7, 9]))
PADDED_PLACES = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 0], [0, 0, 0, 1, 2, 3, 4, 5, 6]])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
def test_own_places(kind: str, as_tensor: bool, window: int | None) -> None:
    mask = Mask.causal() if window is None else Mask.window(window)
    want = torch.arange(1, LENGTH + 1).expand(2, -1)
    if kind == "padded":
        mask, want = mask & PADDED, PADDED_PLACES
    if kind == "packed":
        mask, want = mask & Mask.segments(DOCUMENTS), PLACES
    if as_tensor:
        mask = dense(mask, LENGTH, LENGTH)
    got = counted(mask, LENGTH, LENGTH, windowed=window is not None).expand(2, -1)
    assert torch.equal(got[want > 0], want[want > 0])


@pytest.mark.parametrize("as_tensor", [False, True])
def test_places_in_a_cache(as_tensor: bool) -> None:
    """Two new tokens behind five, in a buffer with two empty places; the second row begins at 3."""
    mask = Mask.causal(5) & Mask.key_range(torch.tensor([0, 3]), torch.tensor([7, 7]))
    if as_tensor:
        mask = dense(mask, 2, LENGTH)
    got = counted(mask, 2, LENGTH)
    assert got[0, :7].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert got[1, 3:7].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_places_behind_a_window(as_tensor: bool) -> None:
    """Four keys are held of nine and seven real ones."""
    mask = Mask.window(4, offset=3)
    if as_tensor:
        mask = dense(mask, 1, 4)
    got = counted(mask, 1, 4, windowed=True, dropped=torch.tensor([5, 3]))
    assert got.tolist() == [[6, 7, 8, 9], [4, 5, 6, 7]]


def test_both_ways_a_value_counts_the_keys_that_its_token_sees() -> None:
    mask = Mask.segments(DOCUMENTS)
    got = counted(mask, LENGTH, LENGTH, "bidirectional")
    assert got[0].tolist() == [4, 4, 4, 4, 5, 5, 5, 5, 5]
    assert got[1, 2:8].tolist() == [4, 4, 4, 4, 2, 2]


def test_cross_attention_counts_the_source() -> None:
    got = counted(PADDED, 3, LENGTH, "cross")
    assert got[:, 0].tolist() == [7, 6]
    assert torch.equal(counted(PADDED, 1, LENGTH, "cross"), got)  # a single step of decoding says the same


def test_groups_take_the_head_that_sees_most() -> None:
    seen = torch.tensor([[[1, 2], [3, 1], [5, 5], [4, 6]]])
    got = value_counts("bidirectional", seen, Mask(), 2, 2, 2)
    assert got.tolist() == [[[3, 2], [5, 6]]]


def test_a_role_that_is_none() -> None:
    with pytest.raises(ValueError, match="causal, bidirectional or cross"):
        counted(Mask(), 2, 2, "sideways")
    with pytest.raises(ValueError, match="as many queries as keys"):
        counted(Mask(), 1, 2, "bidirectional")
