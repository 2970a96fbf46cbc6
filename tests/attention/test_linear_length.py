"""Performer, BigBird and windows are linear in length by construction: counted operations, and the largest tensor made.

The times are `benchmarks/length.py`'s; nothing here is timed.
"""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from benchmarks.length import LINEAR, Mechanism, bends, crossing, inputs, operations, visible_pairs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clearhead.attention import laser, performer
from clearhead.attention.spec import AttentionSpec
from clearhead.kernels import chunked

LENGTHS = (1024, 2048, 4096)
EXACT = [
    *(pytest.param(one, id=one.name) for one in LINEAR),
    pytest.param(Mechanism("features of relu", "performer:relu"), id="performer:relu"),
]
NARROW = [
    pytest.param(
        Mechanism("global tokens", "bigbird:global_tokens=16,block_size=16", causal=False), id="global tokens"
    ),
    pytest.param(Mechanism("self_adjust on blocks", "self_adjust+bigbird:block_size=16"), id="self_adjust+bigbird"),
]
"""Blocks narrower than the 64 rows of a tile: it computes the union of what its blocks draw, at most all of them."""


class Largest(TorchDispatchMode):
    """Remembers the most elements that one new tensor had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *(t.untyped_storage().nbytes() // t.element_size() for t in made)])
        return out


def opened(*operators):
    """Operators of our own as the plain functions inside, into which a dispatch mode can look."""
    stack = ExitStack()
    for module, name in operators:
        stack.enter_context(mock.patch.object(module, name, getattr(module, name)._init_fn))
    return stack


FORWARD = (
    (chunked, "chunked_forward"),
    (laser, "chunked_forward"),
    (laser, "laser_forward"),
    (performer, "linear_forward"),
)
BACKWARD = (
    (chunked, "chunked_backward"),
    (laser, "chunked_backward"),
    (laser, "chunked_forward"),
    (laser, "laser_backward"),
    (performer, "linear_backward"),
)


def largest(mechanism, length):
    """Elements of the largest tensor of the forward and of the backward pass."""
    tensors = inputs(length, heads=1, dim=8)
    with torch.no_grad(), opened(*FORWARD), Largest() as forward:
        mechanism(*tensors, backend=mechanism.backend)
    out = mechanism(*inputs(length, heads=1, dim=8, gradient=True), backend=mechanism.backend)
    gradient = torch.ones_like(out)
    with opened(*BACKWARD), Largest() as backward:
        out.backward(gradient)
    return forward.elements, backward.elements


@pytest.mark.parametrize("mechanism", EXACT)
def test_operations_are_exactly_linear_in_length(mechanism):
    """On one straight line, that is: no term of second order."""
    counts = [operations(mechanism, n, dim=8) for n in LENGTHS]
    assert counts[0] > 0
    assert bends(LENGTHS, counts) == [0] * 3


@pytest.mark.parametrize("mechanism", NARROW)
def test_operations_on_narrow_blocks_are_bounded_by_a_line(mechanism):
    """A tile of 4 blocks has at most the columns of 4 rows of blocks."""
    pattern = AttentionSpec.parse(mechanism.spec).pattern
    blocks = pattern.within(mechanism.mask, 1, 4096).blocks
    dense = 0 if mechanism.causal else 2 * 64 * 4096  # rows of global blocks or tokens
    for length, count in zip(LENGTHS, [operations(mechanism, n, dim=8) for n in LENGTHS], strict=True):
        assert 0 < count <= 4 * 8 * (4 * blocks.width * length + dense)


@pytest.mark.parametrize("mechanism", [p for p in EXACT + NARROW if p.values[0].backend == "chunked"])
def test_visible_pairs_are_exactly_linear_in_length(mechanism):
    pairs = [visible_pairs(mechanism, n) for n in LENGTHS]
    assert bends(LENGTHS, pairs) == [0] * 3


@pytest.mark.parametrize("mechanism", EXACT + NARROW)
def test_no_tensor_grows_faster_than_length(mechanism):
    for short, long in zip(*(largest(mechanism, n) for n in (1024, 2048)), strict=True):
        assert long <= 2 * short
        assert long < 2048**2 / 8


def test_the_measure_sees_what_is_quadratic():
    """The same three on attention that is written out: they must fail."""

    class WrittenOut(Mechanism):
        backend = "reference"

    full = WrittenOut("full", "softmax")
    counts = [operations(full, n, dim=8) for n in (128, 256, 512)]
    assert bends((128, 256, 512), counts)[2] > 0
    assert bends((128, 256, 512), [visible_pairs(full, n) for n in (128, 256, 512)])[2] > 0
    short, long = (largest(full, n)[0] for n in (256, 512))
    assert long >= 4 * short


def test_a_crossing_is_found_between_two_lengths():
    own = {1024: 1.0, 2048: 2.0, 4096: 4.0}
    assert crossing(own, {1024: 0.5, 2048: 2.0, 4096: 8.0}) == "2048"
    assert crossing(own, {1024: 2.0, 2048: 8.0, 4096: 32.0}) == "below 1024"
    assert crossing(own, {1024: 0.1, 2048: 0.4, 4096: 1.6}) == "above 4096"
    assert 1024 < int(crossing(own, {1024: 0.9, 2048: 3.6, 4096: 14.4})) < 2048
