"""The tiled kernel: any tiling gives the same result, memory stays linear, runs repeat bit by bit."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from clearhead.attention.attend import attend
from clearhead.attention.bias import ALiBi
from clearhead.attention.mask import Mask
from clearhead.attention.spec import AttentionSpec
from clearhead.attention.t5 import T5Bias
from clearhead.kernels import chunked
from clearhead.kernels.rule import TILE_RULES
from tests.contract_cases import MASKS, PLAIN, Case, make_inputs
from tests.contract_tools import error_of, run

CPU = torch.device("cpu")


@pytest.mark.parametrize(("rows", "elements"), [(1, 1), (5, 10**4), (16, 2000)])
@pytest.mark.parametrize("mask", MASKS)
def test_any_tiling(mask: str, rows: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a tile or all, one head a tile or several batch rows: the same output and gradients."""
    n = 23
    m = n if MASKS[mask].square else 37
    for i, spec in enumerate(s for s in PLAIN if type(s.weights) in TILE_RULES):
        bias = ("none", "alibi", "dense", "dense_keys", "dense_batch")[(i + len(mask) + rows) % 5]
        inputs = make_inputs(Case(spec, mask, bias, n=n, m=m, d=4, e=3, b=3, h=4), torch.float64, CPU)
        expected = run(inputs, "chunked")
        with monkeypatch.context() as patch:
            patch.setattr(chunked, "ROWS", rows)
            patch.setattr(chunked, "ELEMENTS", elements)
            tiled = run(inputs, "chunked")
        for (name, x), (_, y) in zip(tiled.items(), expected.items()):
            assert error_of(x, y) <= 1e-12, f"{spec} {bias} {name}"


def test_tiles_skip_what_nobody_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window's tiles hold their own columns only, a causal tile none of its future; so work is linear for windows."""
    seen: list[int] = []
    scores = chunked._Call.scores

    def spy(self: Any, q_tile: Tensor, k_tile: Tensor, tile: chunked.Tile) -> Tensor:
        seen.append((tile.rows.stop - tile.rows.start) * (tile.keys.stop - tile.keys.start))
        return scores(self, q_tile, k_tile, tile)

    monkeypatch.setattr(chunked._Call, "scores", spy)

    def work(n: int, mask: Mask) -> int:
        seen.clear()
        x = torch.randn(1, 1, n, 4)
        attend(x, x, x, mask=mask, backend="chunked")
        return sum(seen)

    assert work(2048, Mask.causal()) <= 0.55 * 2048**2
    assert work(2048, Mask.window(100)) <= 2048 * (100 + chunked.ROWS)
    assert work(4096, Mask.window(100)) <= 2.1 * work(2048, Mask.window(100))
    assert work(2048, Mask.key_lengths(torch.tensor([300]))) <= 2048 * 300


class Largest(TorchDispatchMode):
    """The largest tensor, in elements, that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor) and not isinstance(x, torch.nn.Parameter):
                # An expanded view has no memory of its own.
                strides = [size for size, stride in zip(x.shape, x.stride()) if stride]
                self.elements = max(self.elements, int(torch.tensor(strides).prod()) if strides else 1)
        return result


MASKS_AT_LENGTH = {
    "causal": lambda n: Mask.causal(),
    "window": lambda n: Mask.window(256),
    "padding": lambda n: Mask.key_lengths(torch.tensor([n - 100])),
    "left, causal": lambda n: Mask.causal() & Mask.key_range(torch.tensor([100]), None),
    "segments": lambda n: Mask.causal() & Mask.segments(torch.arange(n)[None] // 1000),
}


@pytest.mark.parametrize("mask", MASKS_AT_LENGTH)
@pytest.mark.parametrize("spec", ["softmax", "laser", "self_adjust"])
def test_memory_is_linear(spec: str, mask: str) -> None:
    """No tensor of N x M, forward or backward, with a trained ALiBi: the largest is a tile, or a block of rows in which
    the keys that a query sees are counted (1024, for masks that have no closed form)."""
    sizes = {}
    for n in (2048, 4096):
        q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3))
        bias = ALiBi(torch.rand(1, requires_grad=True))
        with Largest() as largest:
            out = attend(q, k, v, spec, mask=MASKS_AT_LENGTH[mask](n), bias=bias, backend="chunked").out
            torch.autograd.grad(out.sum(), [q, k, v, bias.slopes])
        sizes[n] = largest.elements
    rows = 1024 if mask == "segments" else 2 * chunked.ROWS  # twice as many where rows are long
    assert sizes[4096] <= rows * 4096
    assert sizes[4096] <= 2.1 * sizes[2048]


def test_the_measure_sees_a_matrix() -> None:
    """The check above would notice: the written-out reference makes N x M."""
    q = torch.randn(1, 1, 512, 8)
    with Largest() as largest:
        attend(q, q, q, mask=Mask.causal(), backend="reference")
    assert largest.elements >= 512 * 512


@pytest.mark.parametrize("spec", ["softmax", "laser", "self_adjust"])
def test_runs_repeat(spec: str) -> None:
    """Bit-equal outputs and gradients from one run to the next, and fast enough to be used in tests."""
    case = Case(AttentionSpec.parse(spec), "causal_left", "alibi", n=512, m=512)
    inputs = make_inputs(case, torch.float32, CPU)
    start = time.perf_counter()
    first = run(inputs, "chunked")
    assert time.perf_counter() - start < 5.0
    for (name, x), (_, y) in zip(first.items(), run(inputs, "chunked").items()):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("spec", ["softmax", "self_adjust"])
def test_dropout_draws_anew_for_each_call_head_and_row(spec: str) -> None:
    """Different masks in each call, batch row, head and query; the same ones again after the same seed."""
    q = torch.randn(1, 1, 64, 8).expand(2, 2, 64, 8)
    k = torch.randn(1, 1, 64, 8).expand(2, 2, 64, 8)
    v = torch.eye(64).expand(2, 2, 64, 64)

    def kept() -> Tensor:
        return attend(q, k, v, spec, dropout_p=0.5, backend="chunked").out != 0.0

    torch.manual_seed(5)
    first, second = kept(), kept()
    torch.manual_seed(5)
    assert torch.equal(kept(), first)
    flat = torch.cat([first.flatten(0, 2), second.flatten(0, 2)])
    same = (flat[:, None] == flat[None]).float().mean(-1)
    same.fill_diagonal_(0.5)
    assert float(same.max()) < 0.95
    assert float(same.mean()) == pytest.approx(0.5, abs=0.05)


def _leaves(seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(2, 2, 70, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("biased", [False, True])
def test_the_operator_and_its_eager_form_are_one(
    biased: bool, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = Mask.causal() & Mask.key_lengths(torch.tensor([70, 31]))

    def run() -> list[Tensor]:
        q, k, v = _leaves()
        table = torch.linspace(-1.0, 1.0, 64, dtype=torch.float64).view(2, 32).requires_grad_()
        bias = T5Bias(table, 20) if biased else None
        torch.manual_seed(1)  # dropout's draw
        out = attend(q, k, v, "self_adjust", mask=mask, bias=bias, dropout_p=dropout_p).out
        leaves = [q, k, v, *([table] if biased else [])]
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    eager = run()
    monkeypatch.setattr(chunked, "PLAIN", ())
    for ours, told in zip(eager, run(), strict=True):
        assert torch.equal(ours, told)


def test_a_mask_written_into_before_the_backward_pass_is_noticed() -> None:
    q, k, v = _leaves()
    lengths = torch.tensor([70, 31])
    out = attend(q, k, v, "self_adjust", mask=Mask.key_lengths(lengths)).out
    lengths.sub_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    q, k, v = _leaves()
    out = attend(q, k, v, "self_adjust", mask=Mask.causal()).out
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


def test_torch_counts_the_operations_of_the_tiles() -> None:
    q, k, v = _leaves()
    with FlopCounterMode(display=False) as counter:
        attend(q, k, v, "self_adjust", mask=Mask.causal())
    assert chunked.ROWS == 64
    scores = 2 * 2 * (64 * 64 + 6 * 70)  # rows 0 to 63 see 64 columns, the last six all 70
    assert counter.get_total_flops() == 2 * scores * (8 + 8)


def test_fake_tensors_keep_the_operator() -> None:
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(t.detach()) for t in _leaves())
        q.requires_grad_()
        out = attend(q, k, v, "self_adjust", mask=Mask.causal()).out
    assert out.shape == q.shape
    assert "chunked_attention" in type(out.grad_fn).__name__
