"""`explain_memory` says what a memory that was filled holds, and what a mask that was written out shows."""

from __future__ import annotations

import pytest
import torch

from clearhead.errors import UserError
from clearhead.memory.explain import explain_memory
from clearhead.models.config import ModelConfig
from clearhead.models.decoder import Decoder
from tests.memory.dense import sliding, staircase

SIZES = {"vocab_size": 31, "layers": 3, "width": 16, "heads": 2, "kv_heads": 1, "context": 6}


@pytest.mark.parametrize("position", ["xl", "rope"])
@pytest.mark.parametrize("span", ["memory", "window"])
@torch.no_grad()
def test_it_is_what_a_full_memory_and_its_stream_hold(span, position):
    config = ModelConfig(**SIZES, position=position, memory=f"lengths:0/4/11,range={span}")
    found = explain_memory(config, batch=2)
    model = Decoder(config)
    stream = model.new_stream(2)
    most = 0
    for step in range(40):
        model(torch.full((2, 1), step % 31), state=stream)
        most = max(most, stream.bytes)
    assert stream.memory.bytes == found.bytes
    assert [x.numel() * x.element_size() for x in stream.memory.inputs] == [layer.bytes for layer in found.layers]
    # The most is held before the segment's last token, which closes it: one token's input less than the bound.
    assert most == found.bytes + found.stream_bytes - 2 * 3 * 16 * 4


@pytest.mark.parametrize(
    ("memory", "masks"),
    [
        ("lengths:0/4/11", [staircase(60, 6, n) for n in (0, 4, 11)]),
        ("lengths:0/4/11,range=window", [sliding(60, n) for n in (0, 4, 11)]),
    ],
)
def test_keys_per_query_are_those_of_the_mask_written_out(memory, masks):
    found = explain_memory(ModelConfig(**SIZES, position="xl", memory=memory))
    want = [float(mask[30:36].sum(dim=1).double().mean()) for mask in masks]  # a segment far from the beginning
    assert [layer.keys for layer in found.layers] == pytest.approx(want)
    assert found.keys == pytest.approx(sum(want))


def test_a_window_of_the_attention_cuts_off_further():
    found = explain_memory(ModelConfig(**SIZES, attention="softmax+window:3", memory="lengths:0/4/11"))
    assert [layer.keys for layer in found.layers] == pytest.approx([15 / 6, 3.0, 3.0])


def test_without_a_memory_there_is_nothing_to_tell():
    with pytest.raises(UserError, match="full:512"):
        explain_memory(ModelConfig(**SIZES))
