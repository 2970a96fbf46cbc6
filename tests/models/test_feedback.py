"""The Feedback Transformer: equal to the model written out, in all gradients; truncation, state, documents, padding."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from decoder_cases import TOLERANCE, packed_documents_equal_separate_ones, padding_is_invisible
from naive_feedback import naive_logits
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import clearhead
from clearhead.errors import UserError
from clearhead.models.accounting import mean_memories
from clearhead.models.config import ModelConfig
from clearhead.models.feedback import FeedbackDecoder
from clearhead.models.generate import generate
from clearhead.models.io import load_model, save_model
from clearhead.train.config import RunConfig, TrainConfig

WINDOW, BLOCK = 5, 7
BASE = {"architecture": "feedback", "feedback_window": WINDOW, "feedback_block": BLOCK, "feed_forward": "relu"}
T5 = {"position": "t5", "relative_buckets": 16, "relative_max_distance": 20}
CASES = [
    {"position": "relative_key"},
    {"position": "relative_key", "feedback_start": "zeros", "feedback_share_kv": False, "norm": "layer"},
    {"position": "rope", "qk_norm": True, "kv_heads": 2, "feedback_share_kv": False},
    {"position": "rope", "feedback_start": "zeros", "norm_placement": "post", "norm": "layer", "kv_heads": 1},
    {"position": "alibi", "attention": "laser", "norm": "layer", "feedback_start": "zeros"},
    {"position": "learned", "attention": "self_adjust:form=product", "norm_placement": "post"},
    {"attention": "softmax+selective", "position": "none", "feedback_share_kv": False},
    {"attention": "laser+selective", "position": "rope", "kv_heads": 2, "feedback_start": "zeros"},
    T5,
]
# What the model written out does not know goes through the properties alone.
MORE = [
    {"attention": "self_adjust", "position": "sinusoidal"},
    {"position": "kerple", "attention": "laser"},
    {"position": "fire", "fire_hidden": 5, "fire_threshold": 2.5},
    {"attention": "softmax+selective", "temperature_on": "value", "output_gate": "head", "feed_forward": "swiglu"},
    {"attention": "self_adjust+learned", "position": "none", "embedding_norm": True, "norm_placement": "post"},
]


def ids(cases):
    return [" ".join(str(value) for value in case.values()) for case in cases]


naive_case = pytest.mark.parametrize("case", CASES, ids=ids(CASES))
every_case = pytest.mark.parametrize("case", CASES + MORE, ids=ids(CASES + MORE))


@pytest.fixture
def make(make_model):
    return lambda **case: make_model(**(BASE | case))


def gradients(model, loss):
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found)}


def decoded(model, tokens, size, **options):
    with torch.no_grad():
        state = model.new_state(len(tokens))
        return torch.cat([model(part, state=state) for part in tokens.split(size, dim=1)], dim=1)


def attention_inputs(model, tokens, part, read):
    """What `read` finds in the arguments of (a part of) the first block's attention, token by token."""
    found = []
    module = model.blocks[0].attention.get_submodule(part)
    module.register_forward_pre_hook(lambda module, args: found.append(read(args)))
    model(tokens)
    return found


# ---- equal to the model written out ----


@naive_case
def test_equals_the_model_written_out_in_all_gradients(make, tokens, case):
    model, tokens = make(**case), tokens[:2, :17]
    targets = torch.randn(2, 17, 31, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits = model(tokens)
    expected = torch.stack([naive_logits(model, row) for row in tokens])
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = gradients(model, (logits * targets).sum()), gradients(model, (expected * targets).sum())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert ours["mix.weight"].abs().min() > 1e-3


@pytest.mark.parametrize("start", ["nothing", "zeros"])
def test_documents_equal_the_model_written_out(make, tokens, start):
    model, tokens = make(position="relative_key", norm="layer", feedback_start=start), tokens[:2]
    segments = torch.tensor([[3] * 6 + [1] * 9 + [2] * 5, [0] * 11 + [5] * 9])
    targets = torch.randn(2, 20, 31, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits = model(tokens, segments=segments)
    expected = torch.stack([naive_logits(model, *row) for row in zip(tokens, segments)])
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = gradients(model, (logits * targets).sum()), gradients(model, (expected * targets).sum())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-10)


def test_gradients_flow_inside_a_block_and_stop_at_its_border(make, tokens):
    model, row = make(position="relative_key"), tokens[:1]
    embedded = []
    model.dropout.register_forward_hook(lambda module, args, out: embedded.append(out))
    logits = model(row)
    (gradient,) = torch.autograd.grad(logits[0, 2 * BLOCK - 1].sum(), embedded, retain_graph=True)
    assert (gradient[0, :BLOCK] == 0).all()  # the block before
    assert (gradient[0, BLOCK : 2 * BLOCK].abs().amax(dim=-1) > 1e-6).all()
    assert (gradient[0, 2 * BLOCK :] == 0).all()  # the future
    # Truncation changes gradients and nothing else.
    untruncated = naive_logits(model, row[0], block=0)
    torch.testing.assert_close(logits[0], untruncated, rtol=1e-12, atol=1e-12)
    whole, cut = gradients(model, untruncated.square().sum()), gradients(model, logits.square().sum())
    assert (whole["mix.weight"] - cut["mix.weight"]).abs().max() > 1e-3


def test_a_border_still_teaches_the_matrices_of_the_memory(make, tokens):
    """A block of one token: every memory is carried over a border, so only their new projections can teach."""
    model = make(position="relative_key", feedback_block=1)
    logits = model(tokens[:1])
    expected = naive_logits(model, tokens[0])
    ours, theirs = gradients(model, logits.square().sum()), gradients(model, expected.square().sum())
    for name in ("blocks.0.attention.key.weight", "blocks.0.attention.value.weight", "memory_norm.weight"):
        torch.testing.assert_close(ours[name], theirs[name], **TOLERANCE)
        assert ours[name].abs().max() > 1e-3
    assert ours["mix.weight"] is None  # nothing that it made was ever read with a gradient


def test_a_carried_memory_is_normed_once(make, tokens):
    """The published code norms it twice under pre-norm, so that the size of a block changes its outputs."""
    cases = [make(norm="layer", feedback_block=block, feedback_share_kv=False)(tokens) for block in (1, 4, 64)]
    for logits in cases[1:]:
        torch.testing.assert_close(logits, cases[0], rtol=1e-12, atol=1e-12)


def test_norming_it_twice_would_show(make, tokens):
    """Why the test above is one: twice the norm changes next to nothing with gains of 1, and much with trained ones."""
    changes = []
    for gain in (torch.ones(24), 1.0 + 0.5 * torch.sin(torch.arange(24.0))):
        model = make(norm="layer")
        with torch.no_grad():
            model.memory_norm.weight.copy_(gain)
            model.memory_norm.bias.zero_()
            once = model(tokens)
            model.memory_norm = torch.nn.Sequential(model.memory_norm, model.memory_norm)
            changes.append(float((model(tokens) - once).abs().max()))
    assert changes[0] < 1e-3
    assert changes[1] > 100 * changes[0]


# ---- the mixture ----


def test_the_mixture_starts_as_the_mean_and_can_be_one_layer(make, tokens):
    config = make(layers=3).config
    start = FeedbackDecoder(config).mix
    assert torch.equal(start.shares(), torch.full((4,), 0.25))
    states = torch.randn(4, 2, 1, 24).unbind()
    torch.testing.assert_close(start(states, start.shares()), torch.stack(states).mean(0))
    for layer in range(4):
        start.hold(layer)
        assert torch.equal(start(states, start.shares()), states[layer])
    with pytest.raises(ValueError, match="a layer from 0 to 3, got 4"):
        start.hold(4)


def test_a_held_mixture_learns_nothing_even_when_asked_to(make, tokens):
    model = make()
    model.mix.hold(2)
    model.mix.weight.requires_grad_(True)  # as after loading
    model(tokens).square().sum().backward()
    assert (model.mix.weight.grad == 0).all()


def test_shares_are_taken_in_fp32(make):
    mix = make().mix.to(torch.bfloat16)
    assert mix.shares().dtype == torch.float32


# ---- what a token sees ----


@every_case
def test_a_future_token_changes_no_earlier_logit(make, tokens, case):
    model = make(**case)
    edited = tokens.clone()
    edited[:, 12] = (edited[:, 12] + 1) % 31
    before, after = model(tokens), model(edited)
    assert torch.equal(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().max() > 1e-3


def test_memory_is_strictly_past(make, tokens):
    """Attention at t reads m_{t-1} and older: editing token t cannot reach its keys and values."""
    model = make(layers=1, position="none", feedback_window=1)
    seen = []
    model.blocks[0].attention.output.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    edited = tokens.clone()
    edited[:, 9] = (edited[:, 9] + 1) % 31
    model(tokens), model(edited)
    # With one memory in the window its weight is 1, so what attention mixes is that memory's value alone.
    changed = [not torch.equal(seen[t], seen[20 + t]) for t in range(20)]
    assert changed == [t > 9 for t in range(20)]


@pytest.mark.parametrize("share", [True, False])
def test_all_layers_read_the_last_memories_first_in_first_out(make, tokens, share):
    """What stands in the window of each token, layer by layer: projections of m_{t-window} .. m_{t-1}, oldest first."""
    model, memories = make(position="none", layers=3, feedback_share_kv=share), []
    model.mix.register_forward_hook(lambda module, args, out: memories.append(out))
    read = {layer: [] for layer in range(3)}
    for layer, block in enumerate(model.blocks):
        block.attention.register_forward_pre_hook(lambda module, args, layer=layer: read[layer].append(args[2]))
    model(tokens[:1])
    for t in range(20):
        window = memories[max(t - WINDOW, 0) : t]
        for layer, block in enumerate(model.blocks):
            source = read[layer][t]
            assert source.key.shape[2] == len(window)
            if not window:
                continue
            normed = model.memory_norm(torch.cat(window, dim=1))
            for name in ("key", "value"):
                held = getattr(source, name).transpose(1, 2).flatten(2)
                torch.testing.assert_close(held, getattr(block.attention, name)(normed), **TOLERANCE)
            assert (source is read[0][t]) == (share or layer == 0)


def test_the_newest_memory_is_at_distance_1(make, tokens):
    """A table that is -1000 along every query but at one distance: that memory takes all the weight."""
    model = make(position="relative_key", layers=1, feedback_start="zeros")
    seen, values = [], []
    attention = model.blocks[0].attention
    attention.query.register_forward_hook(lambda module, args, out: torch.ones_like(out))
    attention.output.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attention.register_forward_pre_hook(lambda module, args: values.append(args[2].value))
    for distance in (1, 3, WINDOW):
        with torch.no_grad():
            model.relative_key.table.fill_(-1000.0)
            model.relative_key.table[WINDOW - distance] = 0.0
        seen.clear(), values.clear()
        model(tokens)
        for mixed, value in zip(seen, values):
            torch.testing.assert_close(mixed[:, 0], value[:, :, -distance].flatten(1), **TOLERANCE)


def test_it_sees_farther_than_layers_times_window(make_model):
    """Feedback carries on without end; a decoder of the same window ends after layers * (window - 1) tokens."""
    tokens = torch.randint(0, 31, (1, 30), generator=torch.Generator().manual_seed(1))
    edited = tokens.clone()
    edited[0, 0] = (edited[0, 0] + 1) % 31
    feedback = make_model(**(BASE | {"layers": 2, "feedback_window": 3}))
    plain = make_model(layers=2, attention="softmax+window:4", feed_forward="relu")  # three past tokens and its own
    reach = [(model(tokens) - model(edited)).abs().amax(dim=-1)[0] > 1e-9 for model in (feedback, plain)]
    assert reach[0].all()
    assert reach[1].tolist() == [t <= 2 * 3 for t in range(30)]


def test_what_the_first_token_attends_to(make, tokens):
    """Nothing gives 0; zeros give the mean of the zero vector's values: 0 under RMSNorm, its bias under LayerNorm."""
    found = {}
    for start in ("nothing", "zeros"):
        for norm in ("rms", "layer"):
            model = make(feedback_start=start, norm=norm, position="none")
            found[start, norm] = attention_inputs(model, tokens[:, :1], "output", lambda args: args[0])[0]
            if (start, norm) == ("zeros", "layer"):
                value = model.blocks[0].attention.value.weight @ model.memory_norm.bias
                torch.testing.assert_close(found[start, norm], value.expand(3, 1, -1))
    assert all((found[key] == 0).all() for key in found if key != ("zeros", "layer"))
    assert found["zeros", "layer"].abs().max() > 1e-2
    # With keys of 0, zero vectors are a sink: they take weight from the one memory that holds something.
    sink, none = make(feedback_start="zeros")(tokens), make(feedback_start="nothing")(tokens)
    torch.testing.assert_close(sink[:, 0], none[:, 0], **TOLERANCE)
    assert (sink[:, 1:WINDOW] - none[:, 1:WINDOW]).abs().amax(dim=-1).min() > 1e-4


def test_zeros_leave_the_window_token_by_token(make, tokens):
    """From token `window` on, both starts read the same slots; only what memories made of the start remains."""
    for start, wanted in (("nothing", [0, 1, 2, 3, 4, 5, 5]), ("zeros", [5] * 7)):
        model = make(feedback_start=start)
        assert attention_inputs(model, tokens[:, :7], "", lambda args: args[2].key.shape[2]) == wanted


@every_case
def test_packed_documents_equal_separate_ones(make, tokens, case):
    packed_documents_equal_separate_ones(make(**case), tokens)


@every_case
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_invisible(make, tokens, case, side):
    padding_is_invisible(make(**case), tokens, side)


def test_padding_moves_no_gradient(make, tokens):
    """Blocks are counted from the first real token: a padded row teaches exactly what it teaches alone."""
    model = make(position="relative_key")
    alone = gradients(model, model(tokens[:1, :13]).square().sum())
    for first in (0, 7):
        padded = torch.zeros(2, 20, dtype=torch.long)
        padded[0, first : first + 13], padded[1] = tokens[0, :13], tokens[1]
        valid = torch.ones(2, 20, dtype=torch.bool)
        valid[0] = (torch.arange(20) >= first) & (torch.arange(20) < first + 13)
        found = gradients(model, model(padded, valid=valid)[0][valid[0]].square().sum())
        for name, gradient in alone.items():
            torch.testing.assert_close(found[name], gradient, **TOLERANCE)


def test_padded_documents(make, tokens):
    model = make(feedback_start="zeros", norm="layer")
    segments = torch.tensor([[1] * 9 + [2] * 11]).expand(3, -1)
    valid = (torch.arange(20) >= 4).expand(3, -1)
    found = model(tokens, segments=segments, valid=valid)
    torch.testing.assert_close(found[:, 4:9], model(tokens[:, 4:9]), **TOLERANCE)
    torch.testing.assert_close(found[:, 9:], model(tokens[:, 9:]), **TOLERANCE)


# ---- state ----


@every_case
@pytest.mark.parametrize("size", [1, 4, 20])
def test_decoding_equals_the_forward_pass(make, tokens, case, size):
    model = make(**case)
    torch.testing.assert_close(decoded(model, tokens, size), model(tokens), rtol=1e-12, atol=1e-12)


def test_a_model_made_in_inference_mode_decodes(make, tokens):
    """Its weights have no version, so keys and values are never taken for those of the call before."""
    with torch.inference_mode():
        model = make()
        torch.testing.assert_close(decoded(model, tokens, 3), model(tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("start", ["nothing", "zeros"])
def test_decoding_makes_the_same_memories_bit_by_bit(make, tokens, start):
    """Without gradients it is one path: a memory does not know in how many calls its tokens came."""
    model = make(feedback_start=start, feedback_share_kv=False).float()
    held = []
    with torch.no_grad():
        for size in (1, 6, 20):
            state = model.new_state(3)
            for part in tokens.split(size, dim=1):
                model(part, state=state)
            held.append(state)
    assert torch.equal(held[0].memory, held[1].memory)
    assert torch.equal(held[0].memory, held[2].memory)
    assert held[0].lengths.tolist() == [20] * 3


@pytest.mark.parametrize("start", ["nothing", "zeros"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_unequal_length_go_on_where_they_stand(make, tokens, start, side):
    model = make(feedback_start=start, position="alibi")
    lengths, valid = [9, 2, 6], torch.zeros(3, 9, dtype=torch.bool)
    prompt = torch.full((3, 9), 30)
    for row, length in enumerate(lengths):
        place = slice(9 - length, 9) if side == "left" else slice(0, length)
        valid[row, place] = True
        prompt[row, place] = tokens[row, :length]
    with torch.no_grad():
        state = model.new_state(3)
        model(prompt, valid=valid, state=state)
        assert state.lengths.tolist() == lengths
        parts = [tokens[torch.arange(3), torch.tensor(lengths) + i][:, None] for i in range(9)]
        found = torch.cat([model(part, state=state) for part in parts], dim=1)
        # A second padded chunk, after the first.
        again = model.new_state(3)
        model(prompt, valid=valid, state=again)
        model(prompt, valid=valid, state=again)
        twice = model(tokens[:, :1], state=again)
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, : length + 9])
        torch.testing.assert_close(found[row], alone[0, length:], **TOLERANCE)
        double = torch.cat((tokens[row, :length], tokens[row, :length], tokens[row, :1]))[None]
        torch.testing.assert_close(twice[row], model(double)[0, -1:], **TOLERANCE)


def test_reorder_reset_and_rollback(make, tokens):
    model = make(position="rope")
    full = model(tokens)
    with torch.no_grad():
        state = model.new_state(3)
        model(tokens[:, :8], state=state)
        mark = state.mark()
        state.reorder(torch.tensor([2, 0, 0]))
        found = model(tokens[[2, 0, 0], 8:9], state=state)
        torch.testing.assert_close(found, full[[2, 0, 0], 8:9], **TOLERANCE)
        state.rollback(mark)
        torch.testing.assert_close(model(tokens[:, 8:12], state=state), full[:, 8:12], **TOLERANCE)
        state.reset(torch.tensor([False, True, False]))
        assert state.lengths.tolist() == [12, 0, 12]
        mixed = torch.stack((tokens[0, 12:], tokens[1, :8], tokens[2, 12:]))
        found = torch.cat([model(part, state=state) for part in mixed.split(3, dim=1)], dim=1)
        torch.testing.assert_close(found[1], full[1, :8], **TOLERANCE)
        torch.testing.assert_close(found[::2], full[::2, 12:], **TOLERANCE)
        state.reset()
        torch.testing.assert_close(model(tokens, state=state), full, **TOLERANCE)


def test_new_weights_make_new_keys_and_values(make, tokens):
    """The state is the memories: what an optimizer step changes is projected anew."""
    model = make()
    with torch.no_grad():
        state = model.new_state(3)
        model(tokens[:, :8], state=state)
        memory = state.memory.clone()
        kept = model(tokens[:, 8:9], state=state)
        state.rollback((memory, torch.full((3,), 8), state.number, 8, 8, None))
        mark = state.mark()
        torch.testing.assert_close(kept, model(tokens[:, 8:9], state=state), **TOLERANCE)
        state.rollback(mark)
        for change in (
            lambda: model.blocks[0].attention.key.weight.mul_(1.5),
            lambda: model.memory_norm.load_state_dict({"weight": torch.full((24,), 0.3)}),
        ):
            model(tokens[:, 8:9], state=state)  # projections of the old weights are beside the state now
            before = state.mark()
            change()
            found = model(tokens[:, 9:10], state=state)
            state.rollback(before)
            state.forget_projections()
            torch.testing.assert_close(found, model(tokens[:, 9:10], state=state), **TOLERANCE)
            state.rollback(mark)


def test_a_state_carries_memory_between_training_steps_without_gradients(make, tokens):
    """A call with a state begins a block: two calls of a block each teach what one call of two blocks does."""
    model = make(position="relative_key")
    whole = gradients(model, model(tokens[:, : 2 * BLOCK]).square().sum())
    state = model.new_state(3)
    loss = sum(model(part, state=state).square().sum() for part in tokens[:, : 2 * BLOCK].split(BLOCK, dim=1))
    assert not state.memory.requires_grad
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, whole[name], **TOLERANCE)


@pytest.mark.parametrize("padded", [False, True])
@every_case
def test_a_stream_of_documents_equals_each_document_alone(make, tokens, case, padded):
    """Documents that begin inside a call or at its first token, or go on over three; with padding on either side."""
    model = make(**case)
    segments = torch.tensor([[4] * 13 + [5] * 7, [0] * 7 + [2] * 10 + [1] * 3, [9] * 2 + [8] * 2 + [7] * 16])
    state, found = model.new_state(3), []
    for part, numbers in zip(tokens.split([7, 4, 9], dim=1), segments.split([7, 4, 9], dim=1), strict=True):
        if padded:  # a row's own number of padding on the left, the rest on the right
            width, left = part.shape[1] + 3, torch.tensor([0, 3, 2])
            index = torch.arange(width) - left[:, None]
            valid = (index >= 0) & (index < part.shape[1])
            index = index.clamp(0, part.shape[1] - 1)
            wide, named = part.gather(1, index), torch.where(valid, numbers.gather(1, index), 77)
            logits = model(wide, segments=named, valid=valid, state=state)
            found.append(logits[valid].view(3, part.shape[1], -1))
        else:
            found.append(model(part, segments=numbers, state=state))
    found = torch.cat(found, dim=1)
    for row in range(3):
        for number in segments[row].unique():
            inside = segments[row] == number
            alone = model(tokens[row : row + 1, inside])[0]
            torch.testing.assert_close(found[row, inside], alone, rtol=1e-10, atol=1e-10)
    assert state.lengths.tolist() == [7, 3, 16]
    assert state.number.tolist() == [5, 1, 7]


@every_case
def test_rows_of_unequal_length_with_full_windows_need_no_mask(make, tokens, case):
    """Every window is full, so all rows look alike; the same rows one by one say what must come out."""
    model = make(**case)
    segments = torch.tensor([[4] * 14, [0] * 6 + [2] * 8, [9] * 3 + [8] * 11])
    with torch.no_grad():
        state = model.new_state(3)
        model(tokens[:, :14], segments=segments, state=state)
        assert state.held is None  # unknown until the next call
        looked = []
        model.blocks[0].attention.register_forward_pre_hook(lambda module, args: looked.append(args[1].mask))
        found = model(tokens[:, 14:], segments=segments[:, -1:].expand(-1, 6), state=state)
    assert state.held == WINDOW
    assert state.equal_length is None
    assert len(looked) == 6
    assert not any(mask.terms for mask in looked)
    for row, first in enumerate((0, 6, 3)):
        alone = model(tokens[row : row + 1, first:])[0, -6:]
        torch.testing.assert_close(found[row], alone, rtol=1e-10, atol=1e-10)


def test_a_state_goes_to_disk_and_back(make, tokens):
    model, segments = make(), torch.tensor([[1] * 12, [1] * 5 + [2] * 7, [3] * 12])
    state, again = model.new_state(3), model.new_state(3)
    model(tokens[:, :12], segments=segments, state=state)
    again.load_state_dict({name: held.clone() for name, held in state.state_dict().items()})
    following = torch.tensor([[1] * 8, [2] * 8, [4] * 8])
    logits = [model(tokens[:, 12:], segments=following, state=one) for one in (state, again)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(state.memory, again.memory)
    torch.testing.assert_close(logits[0][2], model(tokens[2:, 12:])[0], **TOLERANCE)
    with pytest.raises(ValueError, match="what is to be loaded has"):
        model.new_state(2).load_state_dict(state.state_dict())


class Operations(TorchDispatchMode):
    """Counts the operations that reach the dispatcher, and the numbers in their results."""

    def __init__(self):
        super().__init__()
        self.calls, self.numbers = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls += 1
        self.numbers += out.numel() if isinstance(out, torch.Tensor) else 0
        return out


@pytest.mark.parametrize("start", ["nothing", "zeros"])
def test_a_long_stream_neither_grows_nor_slows_down(make_model, start):
    """2,000 tokens one by one: the same bytes held, and the same operations on the same sizes, at every token."""
    model = make_model(**(BASE | {"layers": 1, "width": 8, "heads": 2, "feedback_window": 6, "feedback_start": start}))
    model = model.float()
    tokens = torch.randint(0, 31, (1, 2000), generator=torch.Generator().manual_seed(1))
    sizes, work = set(), set()
    with torch.no_grad():
        state = model.new_state(1)
        for t, part in enumerate(tokens.split(1, dim=1)):
            if t > 6 and t % 100 < 10:
                with Operations() as seen:
                    logits = model(part, state=state)
                work.add((seen.calls, seen.numbers))
            else:
                logits = model(part, state=state)
            sizes.add(state.bytes)
        again = model.new_state(1)
        for part in tokens.split(400, dim=1):
            whole = model(part, state=again)
    # Six memories of 8 numbers and their keys and values, 4 bytes each; a length and a document's number of 8 bytes.
    assert sizes == {6 * 8 * 4 + 6 * 16 * 4 + 8 + 8}
    assert len(work) == 1
    assert state.lengths.tolist() == [2000]
    torch.testing.assert_close(logits[:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)


def test_generates_with_padded_prompts(make, tokens):
    model = make()
    alone = generate(model, tokens[:1, :4], max_new_tokens=9, temperature=0.0)
    padded = torch.cat((torch.full((1, 6), 3), tokens[:1, :4]), dim=1)
    both, valid = torch.cat((padded, tokens[1:2, :10])), torch.arange(10).expand(2, -1) >= torch.tensor([[6], [0]])
    found = generate(model, both, max_new_tokens=9, temperature=0.0, valid=valid)
    assert torch.equal(found[0, 10:], alone[0, 4:])
    greedy = tokens[:1, :4]
    for _ in range(9):
        greedy = torch.cat((greedy, model(greedy)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(alone, greedy)


# ---- practice ----


@pytest.mark.parametrize("case", [{}, {"attention": "laser", "position": "alibi"}], ids=str)
def test_bf16_autocast_trains_and_decodes_with_fp32_logits(make, tokens, case):
    model = make(**case).float()
    exact = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
        found = decoded(model, tokens, 3)
    logits.square().mean().backward()
    assert logits.dtype == found.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert (logits - exact).abs().mean() < 0.05 * exact.std()
    assert (found - exact).abs().mean() < 0.05 * exact.std()


def test_dropout_acts_in_training_only(make, tokens):
    model = make(dropout=0.3, attention_dropout=0.2)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("share", [True, False])
def test_saves_and_loads(make, tokens, tmp_path, share):
    model = make(feedback_share_kv=share, position="relative_key", attention="softmax+selective")
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, FeedbackDecoder)
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens), model(tokens))
    first, second = (block.attention for block in loaded.blocks)
    assert (first.key is second.key, first.temperatures.value is second.temperatures.value) == (share, share)
    assert first.query is not second.query


COUNTED = [
    {},
    {"feedback_share_kv": False, "position": "relative_key"},
    {"feedback_start": "zeros", "kv_heads": 2},
    {"attention": "softmax+selective", "temperature_granularity": "shared", "output_gate": "element"},
    {"norm_placement": "post", "feedback_share_kv": False},
]


@pytest.mark.parametrize("options", COUNTED, ids=str)
@pytest.mark.parametrize("tokens_each", [4, 24])
def test_counts_agree_with_torch(make, options, tokens_each):
    model = make(context=24, **options).float()
    counts = model.count_parameters()
    assert "other" not in counts
    assert counts.pop("total") == sum(counts.values()) == sum(p.numel() for p in model.parameters())
    listed = [id(p) for group in model.parameter_groups() for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 31, (3, tokens_each))).sum().backward()
    assert counter.get_total_flops() / (3 * tokens_each) == pytest.approx(model.flops_per_token(tokens_each))


def test_sharing_saves_the_other_layers_matrices(make):
    shared, own = (make(layers=3, feedback_share_kv=share).count_parameters() for share in (True, False))
    assert own["attention"] - shared["attention"] == 2 * 2 * 24 * 24
    assert mean_memories(ModelConfig(**BASE), 8) == (0 + 1 + 2 + 3 + 4 + 5 + 5 + 5) / 8


def test_who_decays(make):
    model = make(position="relative_key")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {g["name"]: {names[id(p)] for p in g["params"]} for g in model.parameter_groups()}
    assert {"mix.weight", "relative_key.table", "memory_norm.weight", "embedding.weight"} <= groups["no_decay"]
    assert "blocks.0.attention.key.weight" in groups["matrices"]


def test_starts_equal_to_a_decoder_in_what_they_share(make):
    config = ModelConfig(**(BASE | {"layers": 2, "width": 24, "heads": 4, "context": 32}))
    ours = dict(clearhead.build_model(config, seed=3).named_parameters())
    plain = dict(clearhead.build_model(dataclasses.replace(config, architecture="decoder"), seed=3).named_parameters())
    both = ours.keys() & plain.keys()
    assert plain.keys() - ours.keys() == {f"blocks.1.attention.{name}.weight" for name in ("key", "value")}
    assert all(torch.equal(ours[name], plain[name]) for name in both)
    report = clearhead.init_(clearhead.build_model(config), "small", seed=1)
    assert {entry.parameter for entry in report.entries} == set(ours)


def _run(**train):
    return RunConfig(model=ModelConfig(architecture="feedback"), train=TrainConfig(steps=100, **train))


REFUSED = [
    (lambda: ModelConfig(architecture="feedback", attention="laser+window:8"), "leave window out"),
    (lambda: ModelConfig(architecture="feedback", init="deepscale"), "init=deepscale: its constants"),
    (lambda: ModelConfig(architecture="feedback", init="admin", norm_placement="post"), "init=admin: its constants"),
    (lambda: ModelConfig(architecture="feedback", feedback_window=0), "feedback_window: expected a whole number"),
    (lambda: ModelConfig(architecture="feedback", feedback_start="zero"), "did you mean 'zeros'"),
    (lambda: ModelConfig(architecture="feedback", memory="full:8"), "set feedback_carry=true to keep it"),
    (lambda: ModelConfig(architecture="feedback", feedback_carry=True, position="learned"), "a stream has no end"),
    (lambda: ModelConfig(architecture="feedback", feedback_carry=1), "feedback_carry: expected true or false"),
    (lambda: ModelConfig(feedback_carry=True), "a decoder reads a stream with memory=full:512"),
    (lambda: ModelConfig(position="relative_key"), "only architecture=feedback has a window"),
    (lambda: _run(parallel="fsdp"), "take ddp"),
    (lambda: _run(inspect_every=5), "runs its blocks once a token"),
    (lambda: clearhead.signal.predict(ModelConfig(architecture="feedback")), "inspect a decoder of the same shape"),
    (lambda: clearhead.init_(FeedbackDecoder(ModelConfig(architecture="feedback")), "deepscale"), "init=deepscale"),
]


@pytest.mark.parametrize(("make_it", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refuses_in_one_line(make_it, message):
    with pytest.raises(UserError) as caught:
        make_it()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_calls_that_do_not_fit(make, tokens):
    model = make(position="learned", context=16)
    with pytest.raises(ValueError, match="learned positions end at context=16"):
        model(tokens)
    with pytest.raises(ValueError, match="capacity: 17"):
        model.new_state(1, 17)
    with pytest.raises(ValueError, match="expected 3 rows of 5 memories of width 24"):
        model(tokens[:, :3], state=model.new_state(2))
    state = model.new_state(3)
    model(tokens[:, :11], state=state)
    with pytest.raises(ValueError, match="6 after 11, but learned positions end"):
        model(tokens[:, :6], state=state)


def test_relative_keys_start_apart():
    """N(0, 1), as published: memories that begin alike at every distance are hard to tell apart."""
    config = ModelConfig(architecture="feedback", position="relative_key", feedback_window=64)
    tables = [FeedbackDecoder(config).relative_key.table for _ in range(2)]
    assert torch.equal(*tables)
    assert abs(float(tables[0].detach().std()) - 1.0) < 0.05
