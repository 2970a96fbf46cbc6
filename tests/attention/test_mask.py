"""`Mask`: what it shows equals the plain rule of each kind, and what it tells kernels is safe."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clearhead.attention.mask import Mask
from clearhead.attention.spec import AttentionSpec
from clearhead.attention.terms import Rows
from tests.contract_cases import MASKS, Case, Layout, sees_by_hand

CPU = torch.device("cpu")
KINDS = sorted(MASKS)


def dense(mask: Mask, b: int, h: int, n: int, m: int) -> Tensor:
    seen = mask.dense_tensor(n, m, CPU)
    return (torch.ones((), dtype=torch.bool) if seen is None else seen).expand(b, h, n, m)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (9, 9), (4, 9), (9, 4), (1, 30), (30, 30)])
def test_equals_the_plain_rule(kind: str, n: int, m: int) -> None:
    if MASKS[kind].square and n != m:
        pytest.skip("this kind has one segment a token")
    case = Case(AttentionSpec(), kind, n=n, m=m, b=3, h=2)
    assert torch.equal(dense(MASKS[kind].make(Layout(case), CPU), 3, 2, n, m), sees_by_hand(case))


kinds = st.lists(st.sampled_from([k for k in KINDS if k not in ("offset", "all_of_them")]), min_size=1, max_size=3)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(kinds, st.integers(1, 20), st.integers(1, 3), st.data())
def test_conjunctions(names: list[str], n: int, b: int, data: st.DataObject) -> None:
    """`a & b` sees what both see; counts, blocks, narrowing and encoding agree with it; bounds for kernels are safe."""
    h = 2
    layout = Layout(Case(AttentionSpec(), n=n, m=n, b=b, h=h))
    mask = Mask()
    for name in names:
        mask = mask & MASKS[name].make(layout, CPU)
    expected = torch.zeros(b, h, n, n, dtype=torch.bool)
    for at in itertools.product(range(b), range(h), range(n), range(n)):
        expected[at] = all(MASKS[name].sees(layout, *at) for name in names)
    mask.check(b, h, n, n)
    assert torch.equal(dense(mask, b, h, n, n), expected)
    assert torch.equal(mask.visible_count(n, n, CPU).expand(b, h, n), expected.sum(-1))

    mask = mask.resolve(n, n)
    assert torch.equal(dense(Mask.decode(*mask.encode()), b, h, n, n), expected)
    if not mask.may_have_empty_rows(n, n):
        assert expected.any(-1).all()
    unseen = mask.unseen_keys(n, 1, CPU)
    if unseen is not None:
        assert not (expected.any(dim=(1, 2)) & unseen[..., 0].any(dim=1).expand(b, n)).any()

    first = data.draw(st.integers(0, n - 1))
    last = data.draw(st.integers(first + 1, n))
    block = expected[:, :, first:last]
    low, high = mask.key_bounds(first, last, n)
    assert not block[..., :low].any()
    assert not block[..., high:].any()
    low, high = mask.sure_bounds(first, last, n)
    assert block[..., low:high].all()
    row = data.draw(st.integers(0, b - 1))
    part = mask.narrow(slice(row, row + 1), slice(1, 2))
    rows = Rows(torch.arange(first, last), torch.arange(n), part.resolved_offset())
    seen = part.visible(rows)
    shown = torch.ones((), dtype=torch.bool) if seen is None else seen
    assert torch.equal(shown.expand(1, 1, last - first, n), expected[row : row + 1, 1:2, first:last])


def test_windows() -> None:
    """Causal, n keys with the own one; bidirectional, (n - 1) // 2 on each side."""
    assert dense(Mask.window(3), 1, 1, 5, 5)[0, 0, 4].tolist() == [False, False, True, True, True]
    for size, side in ((1, 0), (2, 0), (3, 1), (4, 1), (5, 2)):
        assert int(dense(Mask.window(size, causal=False), 1, 1, 9, 9)[0, 0, 4].sum()) == 2 * side + 1


def test_offset() -> None:
    """Bottom-right, or the last valid tokens of a cache whatever its buffer, or as given."""
    assert Mask.causal().resolve(2, 7).offset == 5
    assert dense(Mask.causal(), 1, 1, 1, 7).all(), "a lone query sees its whole past"
    lengths = torch.tensor([3, 7])
    cached = Mask.causal() & Mask.key_lengths(lengths)
    assert dense(cached, 2, 1, 1, 10)[:, 0, 0].sum(-1).tolist() == [3, 7]
    assert dense(cached, 2, 1, 2, 10)[:, 0, 0].sum(-1).tolist() == [2, 6]
    assert dense(Mask.causal(0), 1, 1, 2, 7)[0, 0, 0].sum() == 1
    rows = Mask.causal(torch.tensor([0, 2])) & Mask.window(2) & Mask.key_range(torch.tensor([0, 1]), None)
    assert dense(rows, 2, 1, 2, 4).tolist() == [
        [[[True, False, False, False], [True, True, False, False]]],
        [[[False, True, True, False], [False, False, True, True]]],
    ]
    assert rows.resolve(2, 4).key_bounds(0, 2, 4) == (0, 4)
    assert (Mask.causal(3) & Mask.window(4, offset=3)).offset == 3
    with pytest.raises(ValueError, match="different offsets"):
        Mask.causal(3) & Mask.window(4, offset=2)


def test_visible_count_of_a_long_mask_is_cheap() -> None:
    """The closed form: no 1e6 x 1e6 matrix."""
    count = (Mask.window(100) & Mask.key_lengths(torch.tensor([10**6, 5]))).visible_count(10**6, 10**6, CPU)
    assert count[0, 0, [0, 50, 99, 100, 10**6 - 1]].tolist() == [1, 51, 100, 100, 100]
    assert count[1, 0, [0, 4, 50, 103, 104]].tolist() == [1, 5, 5, 1, 0]


def test_visible_count_of_no_queries() -> None:
    assert Mask.causal(prefix=2).visible_count(0, 5, CPU).shape[-1] == 0
    assert Mask.causal().visible_count(0, 5, CPU).shape[-1] == 0


def test_no_bound_at_all_sees_everything() -> None:
    mask = Mask.key_range(None, None).resolve(2, 3)
    assert dense(mask, 1, 1, 2, 3).all()
    unseen = mask.unseen_keys(3, 1, CPU)
    assert unseen is None or not unseen.any()


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: Mask.window(0), ValueError, "expected a size of at least 1, got 0"),
        (lambda: Mask.key_lengths(torch.ones(2)), ValueError, "end must be a 1-d integer tensor"),
        (lambda: Mask.key_range(torch.ones(2, 2, dtype=torch.int64), None), ValueError, "start must be a 1-d"),
        (lambda: Mask.segments(torch.zeros(3, dtype=torch.int64)), ValueError, r"expected \[batch, length\]"),
        (lambda: Mask.dense(torch.zeros(2, 2)), TypeError, "expected a bool tensor"),
        (
            lambda: Mask.key_lengths(torch.tensor([1, 2, 3])).check(2, 1, 4, 4),
            ValueError,
            "for 3 rows, the batch has 2",
        ),
        (
            lambda: Mask.segments(torch.zeros(2, 5, dtype=torch.int64)).check(2, 1, 4, 5),
            ValueError,
            "for 5 queries and 5 keys, the call has 4 and 5",
        ),
        (
            lambda: Mask.dense(torch.ones(2, 3, 4, 4, dtype=torch.bool)).check(2, 2, 4, 4),
            ValueError,
            r"\(2, 3, 4, 4\) does not broadcast to \(2, 2, 4, 4\)",
        ),
    ],
)
def test_errors(make, error: type[Exception], said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=said):
        make()


def test_masks_are_values() -> None:
    mask = Mask.causal()
    with pytest.raises(AttributeError):
        mask.offset = 3  # type: ignore[misc]
    assert (mask & Mask.window(3)).terms[: len(mask.terms)] == mask.terms
    assert mask.terms == mask.terms
    assert len(mask.terms) == 1


PATTERNS = [
    "full",
    "window:4",
    "bigbird:block_size=3",
    "bigbird:block_size=2,global_blocks=1",
    "bigbird:block_size=3,plan=released,seed=4",
    "bigbird:block_size=2,global_blocks=0,global_tokens=3,window_blocks=1,random_blocks=2",
]


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.sampled_from(PATTERNS), st.booleans(), st.integers(1, 40), st.integers(1, 40), st.data())
def test_counts_of_patterns_equal_those_of_the_dense_mask(
    spec: str, causal: bool, n: int, m: int, data: st.DataObject
) -> None:
    """Causal or not; padding on either side, documents (in pieces too), offsets by row; each head draws for itself."""
    b, h = data.draw(st.integers(1, 2)), 3
    mask = Mask.causal() if causal else Mask()

    def numbers(low: int, high: int, size: int) -> Tensor:
        return torch.tensor(data.draw(st.lists(st.integers(low, high), min_size=size, max_size=size)))

    if data.draw(st.booleans()):
        start = numbers(0, m, b)
        mask = mask & Mask.key_range(start, start + numbers(0, m, b))
    if data.draw(st.booleans()):
        key = numbers(-1, 2, b * m).view(b, m)
        if data.draw(st.booleans()):
            key = key.sort(dim=1).values
        mask = mask & (Mask.segments(key) if n == m else Mask.segments(numbers(-1, 2, b * n).view(b, n), key))
    if causal and data.draw(st.booleans()):
        mask = mask & Mask(offset=numbers(-3, 5, b))
    mask = AttentionSpec.parse(spec).pattern.within(mask, h, m).resolve(n, m)
    assert torch.equal(mask.visible_count(n, m, CPU).expand(b, h, n), dense(mask, b, h, n, m).sum(-1))


@pytest.mark.parametrize("causal", [False, True])
def test_visible_count_of_blocks_and_documents_is_cheap(causal: bool) -> None:
    """No 1e6 x 1e6 matrix here either; a middle row sees 8 blocks."""
    mask = Mask.causal() if causal else Mask()
    mask = mask & Mask.segments((torch.arange(10**6) >= 100_000).long()[None])
    count = AttentionSpec.parse("bigbird").pattern.within(mask, 1, 10**6).visible_count(10**6, 10**6, CPU)[0, 0]
    assert count[500_000].item() == (
        8 * 64 - 63 + (500_000 - 100_000) % 64 if causal else 7 * 64 + 32
    )  # the last block is half
    assert count[99_999].item() <= 8 * 64 if causal else 100_000
