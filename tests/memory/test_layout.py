"""Layouts: text, lengths by layer, refusals."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from clearhead.errors import UserError
from clearhead.memory.layout import MemoryLayout, memory_bytes
from clearhead.models.config import ModelConfig


@pytest.mark.parametrize(
    ("text", "layers", "lengths"),
    [
        ("full", 3, (16, 16, 16)),
        ("full:0", 2, (0, 0)),
        ("full:512", 2, (512, 512)),
        ("first:1,long=96,short=4", 3, (96, 4, 4)),
        ("last:1,long=96,short=4", 3, (4, 4, 96)),
        ("last:2", 3, (2, 16, 16)),
        ("interleaved:1,long=9,short=0", 4, (0, 0, 0, 9)),
        ("interleaved:2,long=9,short=0", 4, (0, 9, 0, 9)),
        ("interleaved:4,long=9,short=0", 6, (0, 9, 9, 0, 9, 9)),  # round(1.5), 3, round(4.5), 6
        ("interleaved:5,long=9,short=0", 5, (9, 9, 9, 9, 9)),
        ("lengths:1/2/30,range=window", 3, (1, 2, 30)),
    ],
)
def test_lengths_by_layer(text, layers, lengths):
    layout = MemoryLayout.parse(text)
    assert layout.lengths(layers, 16) == lengths
    assert MemoryLayout.parse(str(layout)) == layout
    assert layout.windowed == ("window" in text)


@pytest.mark.parametrize("layers", range(1, 25))
def test_interleaved_has_k_long_layers_and_the_top_one_among_them(layers):
    for k in range(1, layers + 1):
        lengths = MemoryLayout("interleaved", k, long=2, short=1).lengths(layers, 8)
        assert lengths.count(2) == k
        assert lengths[-1] == 2
        where = [layer for layer, n in enumerate(lengths) if n == 2]
        gaps = {b - a for a, b in itertools.pairwise(where)}
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_the_arithmetic_of_fewer_long_memories():
    """24 layers, 2304 long, 128 short: 55,296 slots for 24 long memories, and how many times fewer for 12, 4 and 1."""
    slots = {k: sum(MemoryLayout("last", k, long=2304, short=128).lengths(24, 768)) for k in (24, 12, 4, 1)}
    assert slots[24] == 55_296
    assert [round(slots[24] / slots[k], 1) for k in (12, 4, 1)] == [1.9, 4.7, 10.5]
    assert memory_bytes((2, 3), batch=4, width=8, element_size=4) == 5 * 4 * 8 * 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lst:1", "unknown layout 'lst' .did you mean 'last'"),
        ("last", "expected a whole number"),
        ("last:x", "expected a whole number, got 'x'"),
        ("last:1,big=4", "unknown option 'big=4'"),
        ("last:1,long=4,long=5", "given twice"),
        ("last:-1", "at least 0"),
        ("full:4,short=2", "no layer is short"),
        ("lengths:1/2,long=4", "leave out long and short"),
        ("lengths:", "whole number"),
        ("full:4,range=far", "memory range"),
        ("", "unknown layout"),
    ],
)
def test_what_means_nothing_is_refused(text, says):
    with pytest.raises(UserError, match=says):
        MemoryLayout.parse(text)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"memory": "lengths:1/2"}, "2 lengths, the model 3 layers"),
        ({"memory": "last:4"}, "4 long memories, but the model has 3"),
        ({"memory": "full:4", "architecture": "encoder"}, "only architecture=decoder"),
        ({"memory": "full:4", "position": "learned"}, "take xl, rope"),
        ({"memory": "full:4", "attention": "bigbird"}, "document's beginning"),
        ({"memory": 4}, "expected text"),
        ({"xl_width": 8, "position": "rope"}, "only position=xl"),
        ({"xl_width": 7, "position": "xl"}, "even width"),
    ],
)
def test_a_config_refuses_what_cannot_be_built(options, says):
    with pytest.raises(UserError, match=says):
        ModelConfig(**({"layers": 3} | options))


def test_the_config_keeps_the_canonical_text():
    assert ModelConfig(memory="last:1, long=8, range=memory").memory == "last:1,long=8"


def test_layouts_need_no_torch():
    code = "import sys, clearhead.memory.layout; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
