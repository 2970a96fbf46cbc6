"""A performer's recurrent sums: equal to the whole, of constant size, row by row."""

from __future__ import annotations

import pytest
import torch

from clearhead.attention.attend import attend
from clearhead.attention.mask import Mask
from clearhead.attention.spec import AttentionSpec, Performer
from clearhead.memory.cache import KVCache
from clearhead.memory.performer import PerformerState

SPECS = [f"performer:kernel={kernel},features=12{read}" for kernel in Performer.KERNELS for read in ("", "+laser")
         if not (read and kernel == "trigonometric")]  # fmt: skip
TOLERANCE = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.float64: dict(rtol=1e-12, atol=1e-12)}


def qkv(b=3, n=40, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((b, 4, n, 8), (b, 2, n, 8), (b, 2, n, 6))
    return tuple(torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)


def state_for(spec, b=3, dtype=torch.float64):
    return PerformerState.allocate(b, 2, AttentionSpec.parse(spec).weights.width, 6, dtype=dtype)


def part(tensors, rows, first, last):
    return tuple(t[rows, :, first:last] for t in tensors)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("spec", SPECS)
def test_steps_of_any_size_equal_the_whole(spec, dtype):
    if "trigonometric" in spec and dtype == torch.float32:
        return  # its sums want float64
    tensors = qkv(dtype=dtype)
    full = attend(*tensors, spec, mask=Mask.causal()).out
    for steps in ([1] * 40, [17, 1, 1, 20, 1], [40]):
        state, outs, done = state_for(spec, dtype=dtype), [], 0
        for n in steps:
            outs.append(attend(*part(tensors, slice(None), done, done + n), spec, mask=Mask.causal(), state=state).out)
            done += n
            assert state.lengths.tolist() == [done] * 3
        torch.testing.assert_close(torch.cat(outs, dim=2), full, **TOLERANCE[dtype])


@pytest.mark.parametrize("spec", ["performer:features=12", "performer:kernel=relu,features=12+laser"])
def test_ragged_rows_are_each_as_if_alone(spec):
    """Left-padded prefill with garbage in the padding, a right-padded chunk, reorder, reset of a row."""
    tensors = qkv()
    state, held = state_for(spec), [[], [], []]

    def feed(first, last, starts, ends):
        q, k, v = (t[:, :, first:last].clone() for t in tensors)
        for row, (start, end) in enumerate(zip(starts, ends)):
            for t in (k, v):
                t[row, :, :start], t[row, :, end:] = float("nan"), 1e9
            held[row] += [(row, first + t) for t in range(start, end)]
        mask = Mask.causal() & Mask.key_range(torch.tensor(starts), torch.tensor(ends))
        out = attend(q, k, v, spec, mask=mask, state=state).out
        assert state.lengths.tolist() == [len(h) for h in held]
        for row, (start, end) in enumerate(zip(starts, ends)):
            rows, places = (list(x) for x in zip(*origin[row], *((row, first + t) for t in range(start, end))))
            alone = [t[rows, :, places].transpose(0, 1)[None] for t in tensors]
            true = attend(*alone, spec, mask=Mask.causal()).out[0, :, len(rows) - (end - start) :]
            torch.testing.assert_close(out[row, :, start:end], true, rtol=1e-11, atol=1e-11)
            origin[row] += [(row, first + t) for t in range(start, end)]

    origin = [[], [], []]
    feed(0, 10, [0, 4, 9], [10, 10, 10])
    feed(10, 13, [0, 0, 0], [3, 1, 2])
    index = [1, 0, 0]
    state.reorder(torch.tensor(index))
    held[:] = [list(held[i]) for i in index]
    origin[:] = [list(origin[i]) for i in index]
    feed(13, 15, [0, 0, 0], [2, 2, 2])
    state.reset(torch.tensor([False, True, False]))
    held[1], origin[1] = [], []
    feed(15, 20, [0, 2, 0], [5, 5, 5])
    state.reset()
    assert state.lengths.tolist() == [0, 0, 0]
    held[:], origin[:] = [[], [], []], [[], [], []]
    feed(20, 24, [0, 1, 0], [4, 4, 4])


def test_its_size_does_not_grow():
    spec = "performer:features=12"
    state = state_for(spec)
    before = state.bytes
    assert before == sum(t.numel() * 8 for t in (state.carry.total, state.carry.level, state.high, state.low))
    tensors = qkv(n=600)
    for first in range(0, 600, 200):
        attend(*part(tensors, slice(None), first, first + 200), spec, mask=Mask.causal(), state=state)
    assert state.bytes == before
    assert state.lengths.tolist() == [600] * 3


def test_a_refused_call_leaves_it_as_it_was():
    spec = "performer:features=12+laser"
    tensors = qkv(n=4)
    state = state_for(spec)
    attend(*tensors, spec, mask=Mask.causal(), state=state)
    mark = state.mark()
    wide = (tensors[0], tensors[1], tensors[2] * 1e4)
    with pytest.raises(ValueError, match="values spread over"):
        attend(*wide, spec, mask=Mask.causal(), state=state)
    again = attend(*tensors, spec, mask=Mask.causal(), state=state).out
    state.rollback(mark)
    assert torch.equal(attend(*tensors, spec, mask=Mask.causal(), state=state).out, again)


def test_refusals():
    q, k, v = qkv(n=4)
    state, causal = state_for("performer:features=12"), Mask.causal()
    call = lambda *t, spec="performer:features=12", mask=causal, **more: attend(
        *t, spec, mask=mask, state=state, **more
    )
    with pytest.raises(ValueError, match="must be causal"):
        call(q, k, v, mask=Mask())
    with pytest.raises(ValueError, match="serves performer only"):
        call(q, k, v, spec="softmax")
    with pytest.raises(ValueError, match="sums over 12 features, the projection makes 9"):
        call(q, k, v, spec="performer:features=9")
    with pytest.raises(ValueError, match="carries no gradients"):
        call(q, k.clone().requires_grad_(), v)
    with pytest.raises(ValueError, match="holds 3 rows"):
        call(q[:1], k[:1], v[:1])
    with pytest.raises(ValueError, match="holds no keys"):
        call(q, k, v, want=["weights"])
    with pytest.raises(ValueError, match="holds no keys to write scores of"):
        call(q, k, v, backend="reference")
    with pytest.raises(TypeError, match="allocate it with the model's dtype"):
        attend(q, k, v, "performer:features=12", mask=Mask.causal(), state=state_for("performer:features=12",
               dtype=torch.float32))  # fmt: skip
    with pytest.raises(ValueError, match="at least 1"):
        PerformerState.allocate(1, 0, 4, 4)
    assert state.lengths.tolist() == [0, 0, 0]
    call(q, k, v)
    state.crop(4)
    with pytest.raises(ValueError, match="cannot forget some of them"):
        state.crop(3)


def test_underflow_asks_for_float64():
    """A state has no keys to compute a row from term by term."""
    spec = "performer:features=12"
    q = torch.full((1, 1, 1, 8), 60.0)
    state = PerformerState.allocate(1, 1, 12, 6)
    with pytest.raises(ValueError, match="allocate it in float64"):
        attend(q, -q, torch.ones(1, 1, 1, 6), spec, mask=Mask.causal(), state=state)
    state = PerformerState.allocate(1, 1, 12, 6, dtype=torch.float64)
    out = attend(q, -q, torch.ones(1, 1, 1, 6), spec, mask=Mask.causal(), state=state).out
    torch.testing.assert_close(out, torch.ones(1, 1, 1, 6))


def test_a_key_value_cache_serves_too():
    """Where rows must be cropped: not of constant size, but the same numbers."""
    spec = "performer:features=12"
    tensors = qkv()
    full = attend(*tensors, spec, mask=Mask.causal()).out
    cache = KVCache.allocate(3, 2, 40, 8, value_dim=6, dtype=torch.float64)
    outs = [attend(*part(tensors, slice(None), a, b), spec, mask=Mask.causal(), state=cache).out
            for a, b in ((0, 30), (30, 31), (31, 40))]  # fmt: skip
    torch.testing.assert_close(torch.cat(outs, dim=2), full, rtol=1e-12, atol=1e-12)
