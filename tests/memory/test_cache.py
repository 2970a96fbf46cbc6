"""The static cache: whatever happens to it, each row reads as its own tokens alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from clearhead.attention.attend import attend
from clearhead.attention.mask import Mask
from clearhead.memory.cache import KVCache

B, H, G, D, E, CAPACITY = 3, 4, 2, 4, 3, 20


class CacheMachine(RuleBasedStateMachine):
    """Random steps beside a model that keeps plain lists of keys and values for each row."""

    @initialize(
        seed=st.integers(0, 2**16), spec=st.sampled_from(["softmax", "laser", "self_adjust", "softmax+window:5"])
    )
    def start(self, seed: int, spec: str) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.spec = spec
        self.cache = KVCache.allocate(B, G, CAPACITY, D, value_dim=E, dtype=torch.float64)
        self.keys: list[list[Tensor]] = [[] for _ in range(B)]
        self.values: list[list[Tensor]] = [[] for _ in range(B)]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64)

    def feed(self, n: int, starts: list[int], ends: list[int], told: bool) -> None:
        q, k, v = self.normal(B, H, n, D), self.normal(B, G, n, D), self.normal(B, G, n, E)
        for row in range(B):
            for t in range(starts[row], ends[row]):
                self.keys[row].append(k[row, :, t].clone())
                self.values[row].append(v[row, :, t].clone())
            k[row, :, : starts[row]], v[row, :, ends[row] :] = float("nan"), float("inf")
        mask = Mask.causal()
        if told:
            mask = mask & Mask.key_range(torch.tensor(starts), torch.tensor(ends))
        out = attend(q, k, v, self.spec, mask=mask, state=self.cache).out
        for row in range(B):
            new = ends[row] - starts[row]
            if new == 0:
                continue
            alone = attend(
                q[row : row + 1, :, starts[row] : ends[row]],
                torch.stack(self.keys[row], dim=1)[None],
                torch.stack(self.values[row], dim=1)[None],
                self.spec,
                mask=Mask.causal(),
                backend="reference",
            ).out
            assert torch.allclose(out[row : row + 1, :, starts[row] : ends[row]], alone, atol=1e-10)

    def room(self) -> int:
        return CAPACITY - max(len(row) for row in self.keys)

    @precondition(lambda self: self.room() > 0)
    @rule(data=st.data())
    def plain_chunk(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(1, min(6, self.room())))
        self.feed(n, [0] * B, [n] * B, told=False)

    @rule(data=st.data())
    def ragged_chunk(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(1, 7))
        starts, ends = [], []
        for row in range(B):
            start = data.draw(st.integers(0, n))
            most = min(n, start + CAPACITY - len(self.keys[row]))
            starts.append(start)
            ends.append(data.draw(st.integers(start, most)))
        self.feed(n, starts, ends, told=True)

    @rule(index=st.lists(st.integers(0, B - 1), min_size=B, max_size=B))
    def reorder(self, index: list[int]) -> None:
        self.cache.reorder(torch.tensor(index))
        self.keys = [list(self.keys[i]) for i in index]
        self.values = [list(self.values[i]) for i in index]

    @rule(length=st.integers(0, CAPACITY))
    def crop(self, length: int) -> None:
        self.cache.crop(length)
        self.keys = [row[:length] for row in self.keys]
        self.values = [row[:length] for row in self.values]

    @rule(rows=st.lists(st.booleans(), min_size=B, max_size=B), as_indices=st.booleans())
    def reset_rows(self, rows: list[bool], as_indices: bool) -> None:
        told = torch.tensor(rows)
        self.cache.reset(told.nonzero().flatten() if as_indices else told)
        for row in range(B):
            if rows[row]:
                self.keys[row], self.values[row] = [], []

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.keys, self.values = [[] for _ in range(B)], [[] for _ in range(B)]

    @invariant()
    def lengths(self) -> None:
        if hasattr(self, "cache"):
            assert self.cache.lengths.tolist() == [len(row) for row in self.keys]


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    derandomize=True, deadline=None, max_examples=40, stateful_step_count=15, suppress_health_check=list(HealthCheck)
)


def tokens(n: int, b: int = B) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(b, H, n, D), torch.randn(b, G, n, D), torch.randn(b, G, n, D)


def step(cache: KVCache, n: int, mask: Mask | None = None) -> Tensor:
    return attend(*tokens(n), mask=Mask.causal() if mask is None else mask, state=cache).out


def test_sizes() -> None:
    cache = KVCache.allocate(2, 3, 10, 8, value_dim=4, dtype=torch.bfloat16)
    assert cache.capacity == 10
    assert cache.bytes == 2 * 3 * 11 * (8 + 4) * 2
    assert cache.lengths.tolist() == [0, 0]
    assert cache.lengths.dtype == torch.int64


def test_memory_of_equal_rows_is_not_copied() -> None:
    """Plain decoding reads the buffer itself: no copy of the cache at each step."""
    cache = KVCache.allocate(B, G, CAPACITY, D)
    _, k, v = tokens(4)
    held, _, mask = cache.append(k, v, Mask.causal())
    assert held.data_ptr() == cache.key.data_ptr()
    assert held.shape[2] == 4
    assert mask.offset == 0


def test_full() -> None:
    cache = KVCache.allocate(B, G, 6, D)
    step(cache, 5)
    with pytest.raises(ValueError, match="7 tokens do not fit a capacity of 6"):
        step(cache, 2)
    assert cache.lengths.tolist() == [5] * B, "a refused step leaves the cache as it was"
    step(cache, 1)
    ragged = KVCache.allocate(B, G, 6, D)
    step(ragged, 5, Mask.causal() & Mask.key_lengths(torch.tensor([5, 1, 3])))
    step(ragged, 3, Mask.causal() & Mask.key_lengths(torch.tensor([1, 3, 3])))  # padding takes no room
    with pytest.raises(ValueError, match="8 tokens do not fit a capacity of 6"):
        step(ragged, 2)
    assert ragged.lengths.tolist() == [6, 4, 6]


def test_crop_and_reset_of_equal_rows() -> None:
    """While all rows are equal the length is known on the host: it must go back too."""
    cache = KVCache.allocate(B, G, 9, D)
    q, k, v = tokens(6)
    full = attend(q, k, v, mask=Mask.causal()).out
    for first, last in ((0, 6), (2, 5), (5, 6), (0, 3)):
        cache.crop(first) if first else cache.reset()
        part = slice(first, last)
        out = attend(q[:, :, part], k[:, :, part], v[:, :, part], mask=Mask.causal(), state=cache).out
        assert torch.allclose(out, full[:, :, part], atol=1e-6)
        assert cache.lengths.tolist() == [last] * B


@pytest.mark.parametrize(
    "mask",
    [
        Mask.causal(3),
        Mask.dense(torch.ones(1, 1, 2, 2, dtype=torch.bool)),
        Mask.segments(torch.zeros(B, 2, dtype=torch.int64)),
        Mask.causal(prefix=2),
    ],
)
def test_masks_that_a_cache_cannot_keep(mask: Mask) -> None:
    cache = KVCache.allocate(B, G, 6, D)
    with pytest.raises(ValueError, match="KVCache"):
        step(cache, 2, mask)
    assert cache.lengths.tolist() == [0] * B


def test_what_does_not_fit_is_said() -> None:
    cache = KVCache.allocate(B, G, 6, D)
    q, k, v = tokens(2)
    for told, error, said in (
        ((q, k.requires_grad_(), v), ValueError, "carries no gradients"),
        ((q.bfloat16(), k.detach().bfloat16(), v.bfloat16()), TypeError, "holds torch.float32, got torch.bfloat16"),
        (tokens(2, b=2), ValueError, r"holds \[batch, kv_heads"),
    ):
        with pytest.raises(error, match=said):
            attend(*told, mask=Mask.causal(), state=cache)
        assert cache.lengths.tolist() == [0] * B
    with pytest.raises(ValueError, match="must be at least 1"):
        KVCache.allocate(0, 1, 1, 1)
    with pytest.raises(ValueError, match="at least 0"):
        cache.crop(-1)


@pytest.mark.parametrize("width", [1, D + 1])
def test_values_of_another_width(width: int) -> None:
    cache = KVCache.allocate(B, G, 6, D)
    q, k, _ = tokens(2)
    with pytest.raises(ValueError, match="KVCache"):
        attend(q, k, torch.randn(B, G, 2, width), mask=Mask.causal(), state=cache)


def test_a_new_batch_size_by_reorder() -> None:
    """Beams: rows may multiply."""
    cache = KVCache.allocate(1, G, 9, D)
    first = tokens(4, b=1)
    attend(*first, mask=Mask.causal(), state=cache)
    cache.reorder(torch.tensor([0, 0, 0]))
    q, k, v = tokens(2)
    out = attend(q, k, v, mask=Mask.causal(), state=cache).out
    whole = [torch.cat([a.expand(3, -1, -1, -1), b], dim=2) for a, b in zip(first, (q, k, v))]
    assert torch.allclose(out, attend(*whole, mask=Mask.causal()).out[:, :, 4:], atol=1e-6)


def test_inference_mode_and_no_grad() -> None:
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            cache = KVCache.allocate(B, G, 9, D)
            q, k, v = (x.requires_grad_() if context is torch.no_grad else x for x in tokens(3))
            attend(q, k, v, mask=Mask.causal(), state=cache)
            step(cache, 1)
        assert cache.lengths.tolist() == [4] * B


def test_old_masks_keep_their_lengths() -> None:
    """What a step was told is a value: the next step does not change it."""
    cache = KVCache.allocate(B, G, 9, D)
    _, k, v = tokens(3)
    _, _, mask = cache.append(k, v, Mask.causal() & Mask.key_lengths(torch.tensor([3, 1, 2])))
    before = [x.clone() for term in mask.terms for x in term.tensors()]
    lengths = cache.lengths
    cache.append(k, v, Mask.causal())
    cache.reset()
    step(cache, 2)
    assert all(torch.equal(x, y) for x, y in zip(before, [x for term in mask.terms for x in term.tensors()]))
    assert lengths.tolist() == [3, 1, 2]


@pytest.mark.parametrize("spec", ["softmax", pytest.param("laser", marks=pytest.mark.full)])
def test_compiled_decoding(spec: str) -> None:
    """A decode step compiles into one graph, and the steps after it need no new one."""
    q, k, v = tokens(6)
    full = attend(q, k, v, spec, mask=Mask.causal()).out
    cache = KVCache.allocate(B, G, 8, D)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()

    def decode(q: Tensor, k: Tensor, v: Tensor, cache: KVCache) -> Tensor:
        return attend(q, k, v, spec, mask=Mask.causal(), state=cache).out

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    graphs = []
    with torch.no_grad():
        for t in range(6):
            part = slice(t, t + 1)
            out = compiled(q[:, :, part], k[:, :, part], v[:, :, part], cache)
            assert torch.allclose(out, full[:, :, part], atol=1e-5)
            graphs.append(counters["unique_graphs"])
    assert cache.lengths.tolist() == [6] * B
    assert graphs[-1] == graphs[2], f"graphs after each step: {graphs}"
