from __future__ import annotations

import pytest
import torch

from clearhead.models.generate import candidates, generate, sample


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "softmax", "position": "learned"},
        {"attention": "laser+selective", "position": "rope", "kv_heads": 2},
        {"attention": "self_adjust+window:4", "position": "alibi"},
    ],
    ids=str,
)
def test_greedy_equals_argmax_without_a_cache(make_model, tokens, options):
    model = make_model(**options)
    expected = tokens[:, :5]
    with torch.no_grad():
        for _ in range(10):
            expected = torch.cat((expected, model(expected)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generate(model, tokens[:, :5], max_new_tokens=10, temperature=0.0), expected)
    assert torch.equal(generate(model, tokens[:, :5], max_new_tokens=10, top_k=1), expected)
    assert torch.equal(generate(model, tokens[:, :5], max_new_tokens=10, top_p=1e-9), expected)


def test_left_padded_prompts_continue_as_each_alone(make_model, tokens):
    model = make_model(attention="softmax+selective", position="learned")
    valid = torch.tensor([[True] * 6, [False] * 4 + [True] * 2, [False] * 5 + [True]])
    together = generate(model, tokens[:, :6], max_new_tokens=8, temperature=0.0, valid=valid)
    for row, pad in enumerate((0, 4, 5)):
        alone = generate(model, tokens[row : row + 1, pad:6], max_new_tokens=8, temperature=0.0)
        assert torch.equal(together[row, pad:], alone[0])


def test_samples_follow_the_model(make_model):
    model = make_model()
    prompt = torch.tensor([[3, 4]]).expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = generate(model, prompt, max_new_tokens=1, temperature=1.5, generator=generator)[:, -1]
    share = torch.bincount(drawn, minlength=31) / 4000
    with torch.no_grad():
        wanted = (model(prompt[:1])[0, -1] / 1.5).softmax(-1)
    assert (share - wanted).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_the_generator_decides(make_model, tokens):
    model = make_model()

    def draw(seed):
        return generate(model, tokens, max_new_tokens=6, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_top_k_and_top_p_keep_what_they_say():
    logits = torch.tensor([[0.5, 0.15, 0.3, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()

    def kept(**options):
        return candidates(logits, **options).isfinite().tolist()

    assert kept(top_k=2) == [[True, False, True, False], [False, False, True, True]]
    assert kept(top_k=9) == [[True] * 4] * 2
    assert kept(top_p=0.4) == [[True, False, False, False], [False, False, False, True]]
    assert kept(top_p=0.7) == [[True, False, True, False], [False, False, True, True]]
    assert kept(top_p=0.9) == [[True, True, True, False], [False, True, True, True]]
    assert kept(top_p=1.0) == [[True] * 4] * 2
    # top_p counts what top_k left: 0.5 of 0.8 is above 0.6.
    assert kept(top_k=2, top_p=0.6) == [[True, False, False, False], [False, False, False, True]]
    assert candidates(torch.zeros(1, 4), top_k=2).isfinite().sum() == 2  # ties do not widen the list


def test_temperature_sharpens():
    logits = torch.tensor([[1.0, 0.0]]).expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    hot, cold = (sample(logits, temperature=t, generator=generator).float().mean() for t in (5.0, 0.2))
    assert hot.item() == pytest.approx(1 / (1 + 2.718281828**0.2), abs=0.03)
    assert cold.item() == pytest.approx(1 / (1 + 2.718281828**5), abs=0.01)


def test_a_stopped_row_is_filled_and_all_stopped_ends(make_model, tokens):
    model = make_model()
    free = generate(model, tokens[:, :4], max_new_tokens=12, temperature=0.0)
    stop = int(free[0, 6])
    stopped = generate(model, tokens[:, :4], max_new_tokens=12, temperature=0.0, stop_token=stop)
    first = [row.index(stop) if stop in row else None for row in free[:, 4:].tolist()]
    for row, at in enumerate(first):
        end = stopped.shape[1] if at is None else 4 + at + 1
        assert torch.equal(stopped[row, :end], free[row, :end])
        assert (stopped[row, end:] == stop).all()
    alone = generate(model, tokens[:1, :4], max_new_tokens=12, temperature=0.0, stop_token=stop)
    assert alone.shape[1] == 4 + first[0] + 1


def test_mode_is_restored_and_dropout_is_off(make_model, tokens):
    model = make_model(dropout=0.5).train()
    one, two = (generate(model, tokens, max_new_tokens=5, temperature=0.0) for _ in range(2))
    assert torch.equal(one, two)
    assert model.training
    assert torch.equal(generate(model, tokens, max_new_tokens=0), tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens: expected at least 0"),
        ({"temperature": -1.0}, "temperature: expected at least 0"),
        ({"top_k": 0}, "top_k: expected at least 1"),
        ({"top_p": 0.0}, "top_p: expected a share"),
        ({"top_p": 1.1}, "top_p: expected a share"),
        ({"valid": torch.tensor([[True, False]])}, "pad shorter prompts on the left"),
        ({"prompt_bt": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
        ({"max_new_tokens": 99}, "learned positions end at context=32"),
    ],
)
def test_bad_arguments_are_refused(make_model, options, message):
    model = make_model(position="learned")
    arguments = {"prompt_bt": torch.zeros(1, 2, dtype=torch.long), "max_new_tokens": 3} | options
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)
