"""Segment recurrence equals one full-length forward with a mask per layer, exactly, and what follows from it."""

from __future__ import annotations

import pytest
import torch

from clearhead.memory.layout import MemoryLayout
from tests.memory.dense import dense_forward, sliding, staircase

LAYOUTS = [
    "full:0",
    "full:5",
    "full:40",
    "first:1,long=9,short=2",
    "last:1,long=9,short=0",
    "interleaved:2,long=8,short=3",
    "lengths:0/3/11",
]
SPECS = ["softmax", "laser", "self_adjust", "softmax+selective"]
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
SEGMENT = 7


def masks(layout, tokens=23, layers=3):
    lengths = layout.lengths(layers, SEGMENT)
    if layout.windowed:
        return [sliding(tokens, n) for n in lengths]
    return [staircase(tokens, SEGMENT, n) for n in lengths]


def by_segments(model, tokens, memory, documents=None, segment=SEGMENT):
    parts = tokens.split(segment, dim=1)
    numbers = [None] * len(parts) if documents is None else documents.split(segment, dim=1)
    return torch.cat([model(x, memory=memory, segments=n) for x, n in zip(parts, numbers, strict=True)], dim=1)


@pytest.mark.parametrize("attention", SPECS)
@pytest.mark.parametrize("position", ["xl", "rope", "none"])
@pytest.mark.parametrize("span", ["memory", "window"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_segments_equal_one_masked_pass(make_decoder, stream_tokens, layout, span, position, attention):
    text = f"{layout},range={span}"
    model = make_decoder(attention=attention, position=position, memory=text)
    want = dense_forward(model, stream_tokens, masks(MemoryLayout.parse(text)))
    memory = model.new_memory(3)
    torch.testing.assert_close(by_segments(model, stream_tokens, memory), want, **TOLERANCE)
    # ... and token by token through the segments' borders, a chunk across one of them.
    cuts = [1] * 9 + [8, 3, 3]
    state = model.new_stream(3)
    decoded = torch.cat([model(x, state=state) for x in stream_tokens.split(cuts, dim=1)], dim=1)
    torch.testing.assert_close(decoded, want, **TOLERANCE)


@pytest.mark.parametrize("position", ["alibi", "t5", "kerple", "fire"])
@pytest.mark.parametrize("text", ["full:40", "last:1,long=9,short=2", "full:5,range=window"])
@torch.no_grad()
def test_positions_on_scores_read_a_memory(make_decoder, stream_tokens, text, position):
    """By segments and token by token alike; with a memory that holds everything, like one pass without a memory."""
    model = make_decoder(position=position, memory=text)
    want = by_segments(model, stream_tokens, model.new_memory(3))
    state = model.new_stream(3)
    cuts = [1] * 9 + [8, 3, 3]
    decoded = torch.cat([model(x, state=state) for x in stream_tokens.split(cuts, dim=1)], dim=1)
    torch.testing.assert_close(decoded, want, **TOLERANCE)
    if text == "full:40":
        plain = make_decoder(position=position)
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(plain(stream_tokens), want, **TOLERANCE)


DOCUMENTS = torch.tensor(
    [
        [5] * 3 + [6] * 8 + [7] * 12,  # a border inside each of the first segments
        [1] * 7 + [2] * 14 + [3] * 2,  # a border between two segments
        [0] * 23,
    ]
)


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "softmax+selective"},
        {"attention": "laser+selective", "position": "rope", "norm_placement": "post"},
        {"attention": "self_adjust", "position": "alibi"},
    ],
    ids=lambda options: options["attention"],
)
@pytest.mark.parametrize("span", ["memory", "window"])
@pytest.mark.parametrize("layout", ["lengths:2/9/5", "full:30", "lengths:0/0/0"])
@torch.no_grad()
def test_a_query_sees_the_memory_of_its_own_document(make_decoder, stream_tokens, layout, span, options):
    text = f"{layout},range={span}"
    model = make_decoder(memory=text, **options)
    want = dense_forward(model, stream_tokens, masks(MemoryLayout.parse(text)), DOCUMENTS)
    got = by_segments(model, stream_tokens, model.new_memory(3), DOCUMENTS)
    tolerance = TOLERANCE if options.get("position") != "alibi" else {"rtol": 1e-6, "atol": 1e-6}  # slopes are fp32
    torch.testing.assert_close(got, want, **tolerance)


@torch.no_grad()
def test_an_unlimited_memory_is_the_plain_forward(make_decoder, stream_tokens):
    model = make_decoder(position="t5", attention="laser", memory="")
    got = by_segments(model, stream_tokens, model.new_memory(3, "full:40"), segment=4)
    torch.testing.assert_close(got, model(stream_tokens), **TOLERANCE)


@torch.no_grad()
def test_a_window_does_not_see_where_segments_begin(make_decoder, stream_tokens):
    model = make_decoder(memory="lengths:2/5/9,range=window", attention="softmax+selective")
    whole = model(stream_tokens)  # without a memory: one segment, and the windows hold in it
    torch.testing.assert_close(
        whole, dense_forward(model, stream_tokens, [sliding(23, n) for n in (2, 5, 9)]), **TOLERANCE
    )
    for segment in (1, 4, 23):
        got = by_segments(model, stream_tokens, model.new_memory(3), segment=segment)
        torch.testing.assert_close(got, whole, **TOLERANCE)


@torch.no_grad()
def test_a_change_reaches_as_far_as_the_windows_together(make_decoder):
    lengths = (2, 4, 3)
    model = make_decoder(memory="lengths:2/4/3,range=window")
    tokens = torch.randint(0, 31, (1, 30), generator=torch.Generator().manual_seed(2))
    for changed in (0, 6, 11):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 31
        one, two = (by_segments(model, x, model.new_memory(1), segment=5) for x in (tokens, other))
        moved = (one != two).any(-1)[0].nonzero().flatten().tolist()
        assert moved == list(range(changed, changed + sum(lengths) + 1))


def test_entries_get_no_gradient_and_weights_get_one_through_them(make_decoder, stream_tokens):
    model = make_decoder(memory="full:7")
    memory = model.new_memory(3)
    first = model(stream_tokens[:, :7], memory=memory)
    assert first.requires_grad
    assert not any(x.requires_grad for x in memory.inputs)
    held = [x.clone().requires_grad_() for x in memory.inputs]
    memory.inputs = list(held)
    loss = model(stream_tokens[:, 7:14], memory=memory).square().sum()
    loss.backward()
    assert not any(x.requires_grad for x in memory.inputs)  # what was put in is detached again
    attention = model.blocks[1].attention
    assert attention.key.weight.grad is not None
    # The gradient of W_k is that of the dense formula with the memory held fixed.
    got = {
        n: attention.get_parameter(n).grad.clone() for n in ("key.weight", "value.weight", "relative.distance.weight")
    }
    model.zero_grad()
    fixed = [x.detach() for x in held]
    full = _with_fixed_past(model, stream_tokens[:, 7:14], fixed)
    full.square().sum().backward()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, attention.get_parameter(name).grad, **TOLERANCE)
    # ... which is another one when the memory's keys are made without a gradient.
    model.zero_grad()
    _with_fixed_past(model, stream_tokens[:, 7:14], fixed, through_memory=False).square().sum().backward()
    assert (attention.key.weight.grad - got["key.weight"]).abs().max() > 1e-3


def _with_fixed_past(model, tokens, past, *, through_memory=True):
    """The second segment written out: layer l reads [past_l ; x]."""
    from tests.memory.dense import attention as dense_attention

    x = model.embedding(tokens)
    see = staircase(14, 7, 7)[None].expand(x.shape[0], -1, -1)
    for block, held in zip(model.blocks, past, strict=True):
        norm = block.attention_residual.norm
        both = torch.cat((norm(held), norm(x)), dim=1)
        layer = block.attention
        if through_memory:
            out = dense_attention(model.config, layer, both, see, None)
        else:
            out = dense_attention(model.config, _KeysWithout(layer, 7), both, see, None)
        x = x + out[:, 7:]
        x = x + block.feed_forward(block.feed_forward_residual.norm(x))
    return model.head(model.norm(x))


class _KeysWithout:
    """An attention layer whose keys and values of the first tokens carry no gradient."""

    def __init__(self, layer, tokens):
        self.query, self.output, self.relative = layer.query, layer.output, layer.relative
        self.key = lambda x: torch.cat((layer.key(x[:, :tokens]).detach(), layer.key(x[:, tokens:])), dim=1)
        self.value = lambda x: torch.cat((layer.value(x[:, :tokens]).detach(), layer.value(x[:, tokens:])), dim=1)


@pytest.mark.parametrize("position", ["xl", "rope", "alibi", "t5"])
@torch.no_grad()
def test_float32_a_million_tokens_into_a_document_is_as_exact_as_at_its_beginning(make_decoder, position):
    model = make_decoder(memory="full:7", position=position).float()
    tokens = torch.randint(0, 31, (2, 21), generator=torch.Generator().manual_seed(3))
    early = model.new_memory(2)
    model(tokens[:, :7], memory=early)
    late = early.clone()
    late.read += 10**6
    late.place += 10**6
    assert torch.equal(model(tokens[:, 7:], memory=early), model(tokens[:, 7:], memory=late))
    assert int(late.place[0, -1]) == 10**6 + 20
