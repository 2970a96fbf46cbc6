"""The memory as an object: size, rows, documents, padding, disk; and the stream that decodes with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from clearhead.errors import UserError
from clearhead.memory.layout import MemoryLayout, memory_bytes
from clearhead.models.config import ModelConfig
from clearhead.models.decoder import Decoder
from clearhead.models.generate import generate
from tests.memory.test_recurrence import by_segments

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("text", ["full:9", "last:1,long=20,short=3", "lengths:0/5/0", "full:0"])
@torch.no_grad()
def test_bytes_are_the_sum_over_layers_of_what_the_layout_says(make_decoder, stream_tokens, text):
    model = make_decoder(memory=text).float()
    memory = model.new_memory(3)
    assert memory.bytes == 0
    sizes = []
    for part in stream_tokens.repeat(1, 2).split(7, dim=1):
        model(part, memory=memory)
        sizes.append(memory.bytes)
    lengths = MemoryLayout.parse(text).lengths(3, 7)
    assert memory.bytes == sum(3 * 24 * 4 * n for n in lengths)
    assert memory.bytes == memory_bytes(lengths, batch=3, width=24, element_size=4)
    # Nothing larger is kept alive behind what is counted.
    assert sum(x.untyped_storage().nbytes() for x in memory.inputs) == memory.bytes
    assert sizes == sorted(sizes)
    assert memory.held.tolist() == [max(lengths)] * 3


@torch.no_grad()
def test_a_reset_row_begins_anew_and_the_others_go_on(make_decoder, stream_tokens):
    model = make_decoder(memory="full:9", attention="softmax+selective")
    memory = model.new_memory(3)
    model(stream_tokens[:, :7], memory=memory)
    memory.reset(torch.tensor([False, True, False]))
    got = model(stream_tokens[:, 7:14], memory=memory)
    whole = by_segments(model, stream_tokens[:, :14], model.new_memory(3))[:, 7:]
    torch.testing.assert_close(got[[0, 2]], whole[[0, 2]], **TOLERANCE)
    torch.testing.assert_close(got[1], model(stream_tokens[1:2, 7:14])[0], **TOLERANCE)
    memory.reset()
    torch.testing.assert_close(model(stream_tokens[:, 7:14], memory=memory), model(stream_tokens[:, 7:14]), **TOLERANCE)


@torch.no_grad()
def test_rows_can_be_reordered(make_decoder, stream_tokens):
    model = make_decoder(memory="full:9")
    memory = model.new_memory(3)
    model(stream_tokens[:, :7], memory=memory)
    index = torch.tensor([2, 0, 0])
    memory.reorder(index)
    whole = by_segments(model, stream_tokens[index][:, :14], model.new_memory(3))[:, 7:]
    got = model(stream_tokens[index][:, 7:14], memory=memory)
    torch.testing.assert_close(got, whole, **TOLERANCE)


@torch.no_grad()
def test_what_is_saved_and_loaded_goes_on_bit_for_bit(make_decoder, stream_tokens):
    model = make_decoder(memory="lengths:3/0/12")
    memory = model.new_memory(3)
    numbers = torch.tensor([[4] * 5 + [9] * 2]).expand(3, -1)
    model(stream_tokens[:, :7], memory=memory, segments=numbers)
    other = model.new_memory(3)
    other.load_state_dict(load(save(memory.state_dict())))
    after = torch.full((3, 7), 9)
    for copy in (other, memory.clone(), memory.to("cpu")):
        fresh = memory.clone()
        want = model(stream_tokens[:, 7:14], memory=fresh, segments=after)
        assert torch.equal(model(stream_tokens[:, 7:14], memory=copy, segments=after), want)
    with pytest.raises(ValueError, match="remembers 2 tokens"):
        model.new_memory(3, "full:2").load_state_dict(memory.state_dict())


@torch.no_grad()
def test_other_lengths_at_evaluation_touch_no_parameter(make_decoder, stream_tokens):
    model = make_decoder(memory="full:4")
    longer = make_decoder(memory="full:40")
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in longer.named_parameters()}
    got = by_segments(model, stream_tokens, model.new_memory(3, "full:40"))
    torch.testing.assert_close(got, by_segments(longer, stream_tokens, longer.new_memory(3)), **TOLERANCE)
    # Shortened in the middle of a stream: as if it had been short from the beginning.
    memory = longer.new_memory(3)
    longer(stream_tokens[:, :7], memory=memory)
    short = memory.with_lengths((2, 0, 3))
    assert memory.lengths == (40, 40, 40)
    assert short.bytes == memory_bytes((2, 0, 3), batch=3, width=24, element_size=8)
    want = by_segments(model, stream_tokens[:, :14], model.new_memory(3, "lengths:2/0/3"))[:, 7:]
    torch.testing.assert_close(longer(stream_tokens[:, 7:14], memory=short), want, **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_not_remembered(make_decoder, stream_tokens, side):
    model = make_decoder(memory="lengths:3/6/10", attention="laser+selective")
    memory = model.new_memory(3)
    lengths = torch.tensor([[7, 2, 0], [5, 7, 1], [7, 0, 7]])  # real tokens of each row in each call
    starts = torch.zeros(3, dtype=torch.int64)
    rows: list[list[torch.Tensor]] = [[], [], []]
    for counts in lengths:
        tokens = torch.randint(0, 31, (3, 7), generator=torch.Generator().manual_seed(8))
        valid = torch.zeros(3, 7, dtype=torch.bool)
        for row, count in enumerate(counts.tolist()):
            place = slice(7 - count, 7) if side == "left" else slice(0, count)
            tokens[row, place] = stream_tokens[row, starts[row] : starts[row] + count]
            valid[row, place] = True
        starts += counts
        logits = model(tokens, memory=memory, valid=valid)
        for row in range(3):
            rows[row].append(logits[row][valid[row]])
    for row in range(3):
        alone, first = model.new_memory(1), 0
        for count in lengths[:, row].tolist():
            if count:
                want = model(stream_tokens[row : row + 1, first : first + count], memory=alone)[0]
                torch.testing.assert_close(rows[row].pop(0), want, **TOLERANCE)
            else:
                rows[row].pop(0)
            first += count
        assert torch.equal(memory.held[row], alone.held[0])


@torch.no_grad()
def test_editing_padding_changes_nothing(make_decoder, stream_tokens):
    model = make_decoder(memory="full:9")
    valid = torch.ones(3, 7, dtype=torch.bool)
    valid[1, 4:] = False
    answers = []
    for filler in (0, 30):
        memory = model.new_memory(3)
        first = stream_tokens[:, :7].masked_fill(~valid, filler)
        model(first, memory=memory, valid=valid)
        answers.append(model(stream_tokens[:, 7:14], memory=memory))
    assert torch.equal(*answers)


@torch.no_grad()
def test_a_document_goes_on_when_its_number_does(make_decoder, stream_tokens):
    model = make_decoder(memory="full:9")

    def second(number):
        memory = model.new_memory(3)
        model(stream_tokens[:, :7], memory=memory, segments=torch.full((3, 7), 2))
        return model(stream_tokens[:, 7:14], memory=memory, segments=number)

    same, new = second(torch.full((3, 7), 2)), second(torch.full((3, 7), 5))
    torch.testing.assert_close(new, model(stream_tokens[:, 7:14]), **TOLERANCE)
    assert torch.equal(same, second(None))
    assert not torch.allclose(same, new)


def test_mistakes_are_named(make_decoder, stream_tokens):
    model = make_decoder(memory="")
    with pytest.raises(ValueError, match="say how much"):
        model.new_memory(3)
    with pytest.raises(ValueError, match="expected 3 rows"):
        model(stream_tokens, memory=model.new_memory(2, "full:4"))
    with pytest.raises(UserError, match="take xl, rope"):
        make_decoder(memory="", position="learned", context=32).new_memory(3, "full:4")
    with pytest.raises(ValueError, match="one of them"):
        model(stream_tokens, memory=model.new_memory(3, "full:4"), state=model.new_state(3, 30))
    with pytest.raises(ValueError, match="new_stream"):
        make_decoder(memory="full:4")(stream_tokens, state=model.new_state(3, 30))
    with pytest.raises(ValueError, match="no gradients"):
        model(stream_tokens, state=model.new_stream(3, "full:4"))


# ---- decoding ----


@pytest.mark.parametrize("text", ["last:1,long=9,short=2", "lengths:4/4/4,range=window"])
def test_generated_text_is_what_the_segments_say(make_decoder, text):
    model = make_decoder(memory=text)
    prompt = torch.randint(0, 31, (2, 10), generator=torch.Generator().manual_seed(4))
    out = generate(model, prompt, max_new_tokens=20, temperature=0.0)
    with torch.no_grad():
        logits = by_segments(model, out, model.new_memory(2))
    assert torch.equal(out[:, 10:], logits[:, 9:-1].argmax(-1))


@torch.no_grad()
def test_a_long_stream_takes_no_more_space_than_a_short_one(make_decoder):
    model = make_decoder(memory="last:1,long=9,short=2", layers=2)
    stream = model.new_stream(1)
    sizes = []
    for token in torch.randint(0, 31, (300,), generator=torch.Generator().manual_seed(5)):
        model(token.view(1, 1), state=stream)
        sizes.append(stream.bytes)
    assert max(sizes[:50]) == max(sizes[50:])
    assert sizes[49:56] == sizes[287:294]  # the same place in later segments


def test_prompts_of_unequal_length_are_refused_in_one_line(make_decoder):
    model = make_decoder(memory="full:9")
    prompt, valid = torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool)
    equal = generate(model, prompt, max_new_tokens=3, temperature=0.0, valid=valid)
    assert torch.equal(equal, generate(model, prompt, max_new_tokens=3, temperature=0.0))
    valid[0, :2] = False
    with pytest.raises(ValueError, match="equal length; continue each prompt in a call of its own") as refused:
        generate(model, prompt, max_new_tokens=3, valid=valid)
    assert "\n" not in str(refused.value)


def decode(tokens, at_a_time=1):
    """What a float32 stream of so many tokens holds near the end of each segment, and how much the process grew."""
    model = Decoder(
        ModelConfig(vocab_size=31, context=50, layers=2, width=8, heads=2, memory="last:1,long=90,short=10")
    )
    stream, sizes, resident = model.new_stream(1), [], []
    with torch.inference_mode():
        for place in range(0, tokens, at_a_time):
            model(torch.arange(place, place + at_a_time)[None] % 31, state=stream)
            if stream.open == 50 - at_a_time:
                sizes.append(stream.bytes)
                resident.append(resident_bytes())
    settled = len(resident) // 3
    return stream, sizes, resident[-1] - resident[settled]


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident set from /proc")


@linux
def test_a_stream_of_3000_tokens_stays_flat():
    stream, sizes, grown = decode(3000)
    assert set(sizes[2:]) == {sizes[-1]}  # full after two segments
    # Layer inputs of the memories, keys and values of them and of a segment, 49 open inputs a layer; 4 bytes each.
    assert sizes[-1] == 4 * 8 * ((10 + 90) + 2 * (10 + 90 + 2 * 50) + 2 * 49)
    assert int(stream.memory.read[0]) == 3000
    assert grown < 1 << 20  # two kept tensors a token would be more


@linux
@pytest.mark.full
def test_a_stream_of_200000_tokens_stays_flat():
    stream, sizes, grown = decode(200_000, at_a_time=10)
    assert set(sizes[2:]) == {sizes[-1]}
    assert int(stream.memory.read[0]) == 200_000
    assert grown < 1 << 20


@torch.no_grad()
def test_streams_reorder_and_reset(make_decoder, stream_tokens):
    model = make_decoder(memory="full:9")
    stream = model.new_stream(3)
    model(stream_tokens[:, :10], state=stream)
    index = torch.tensor([1, 1, 0])
    stream.reorder(index)
    whole = by_segments(model, stream_tokens[index], model.new_memory(3))
    torch.testing.assert_close(model(stream_tokens[index][:, 10:], state=stream), whole[:, 10:], **TOLERANCE)
    stream.reset()
    torch.testing.assert_close(model(stream_tokens[index], state=stream), whole, **TOLERANCE)
