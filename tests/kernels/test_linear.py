"""The linear kernel: what it costs, how it enters compiled graphs, and its state."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from clearhead.attention import performer
from clearhead.attention.attend import attend, make_call
from clearhead.attention.mask import Mask
from clearhead.attention.spec import Performer
from clearhead.kernels.features import make_map
from clearhead.kernels.linear import Problem, solve, solve_backward


def problem(length, *, causal=True, chunk=64):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, 2, *size, generator=generator) for size in ((2, length, 8), (length, 8), (length, 4)))
    rows = torch.randn(16, 8, generator=generator)
    v1 = torch.cat([v, torch.ones(1, 2, length, 1)], dim=-1)
    return Problem(q, k, v1, make_map("softmax", rows, torch.float32), 0 if causal else length, chunk=chunk)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.size = max(self.size, t.numel())
        return out


@pytest.mark.parametrize("causal", [True, False])
def test_operations_and_memory_are_linear_in_length(causal):
    flops, sizes = [], []
    for length in (512, 1024, 4096):
        p = problem(length, causal=causal)
        with FlopCounterMode(display=False) as counter, Largest() as largest:
            out, z = solve(p)
            solve_backward(p, torch.ones_like(out), out, z)
        flops.append(counter.get_total_flops())
        sizes.append(largest.size)
    # The two ends (nothing before the first chunk, nothing after the last) are the same at every length.
    assert flops[2] - flops[1] == 6 * (flops[1] - flops[0]) > 0
    assert sizes[2] <= 8 * sizes[0]
    assert sizes[2] < 4096 * 4096 / 8


@pytest.mark.parametrize(
    "mask",
    [
        Mask.causal(),
        Mask(),
        Mask.causal() & Mask.segments(torch.tensor([[0] * 4 + [1] * 5, [3] * 7 + [-1] * 2])),
        Mask.key_range(torch.tensor([2, 0]), torch.tensor([9, 5])),
    ],
    ids=["causal", "none", "causal_segments", "range"],
)
@pytest.mark.parametrize("laser", [False, True])
def test_opcheck(mask, laser):
    q, k, v = (torch.randn(2, h, 9, 4, requires_grad=True) for h in (2, 1, 1))
    code, tensors = mask.resolve(9, 9).encode()
    rest = (torch.randn(6, 4), "softmax", laser, code, tensors, 0.5, 4)
    torch.library.opcheck(performer.linear_forward, (q, k, v, *rest))
    q, k, v = (t.detach() for t in (q, k, v))
    out, z = performer.linear_forward(q, k, v, *rest)
    torch.library.opcheck(performer.linear_backward, (torch.randn_like(out), out, z, q, k, v, *rest))


@pytest.mark.parametrize("spec", ["performer:features=8", "performer:kernel=relu,features=8+laser"])
def test_compiled(spec):
    q, k, v = (torch.randn(2, 2, 20, 4, requires_grad=True) for _ in range(3))

    def call(q, k, v):
        return attend(q, k, v, spec, mask=Mask.causal()).out

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(call(q, k, v).square().sum(), (q, k, v))
    for mine, true in zip(torch.autograd.grad(compiled(q, k, v).square().sum(), (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("kernel", Performer.KERNELS)
@pytest.mark.parametrize("chunk", [1, 3, 128])
def test_gradients_of_chunks(kernel, chunk):
    """Several chunks, grouped queries, queries before and after the keys: numeric differences."""
    sizes = ((2, 5, 3), (1, 7, 3), (1, 7, 2))
    q, k, v = (torch.randn(1, *size, dtype=torch.float64, requires_grad=True) for size in sizes)
    for offset in (-2, 0, 4):
        mask = Mask.causal(offset) & Mask.key_range(torch.tensor([1]), None)

        def call(q, k, v, mask=mask):
            made = make_call(q, k, v, f"performer:kernel={kernel},features=5", mask=mask)
            return performer.performer_attention(made, chunk)

        assert torch.autograd.gradcheck(call, (q, k, v), fast_mode=True)
