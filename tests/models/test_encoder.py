"""The encoder: every token sees every token of its document and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from decoder_cases import CASES, IDS, packed_documents_equal_separate_ones, padding_is_invisible

from clearhead.errors import UserError
from clearhead.models.config import ModelConfig
from clearhead.models.encoder import Encoder
from clearhead.models.io import load_model, save_model
from clearhead.models.make import build_model

ENCODER = [
    {key: value + 2 if key == "relative_buckets" else value for key, value in case.items()}
    | {"architecture": "encoder"}
    for case in CASES
]
every_case = pytest.mark.parametrize("case", ENCODER, ids=IDS)


@every_case
def test_each_token_sees_both_sides(make_model, tokens, case):
    model = make_model(**case, layers=4)  # four windows of 4 keys reach far enough
    for place in (2, 17):
        edited = tokens.clone()
        edited[:, place] = (edited[:, place] + 1) % 31
        moved = (model(tokens) - model(edited)).abs().amax(dim=(0, 2))
        near = slice(place - 2, place + 3)
        assert (moved[near] > 1e-8).all()
        if "window" not in case["attention"]:
            assert (moved > 1e-8).all()


@every_case
def test_packed_documents_equal_separate_ones(make_model, tokens, case):
    packed_documents_equal_separate_ones(make_model(**case), tokens)


@every_case
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_invisible(make_model, tokens, case, side):
    padding_is_invisible(make_model(**case), tokens, side)


@pytest.mark.parametrize("position", ["none", "t5", "alibi", "xl", "kerple", "fire"])
def test_the_only_order_is_the_position_s(make_model, tokens, position):
    """Without positions a permutation of the tokens permutes the logits; with them it does not."""
    model = make_model(architecture="encoder", position=position)
    order = torch.randperm(20)
    same = torch.allclose(model(tokens)[:, order], model(tokens[:, order]))
    assert same == (position == "none")


def test_temperatures_count_visible_keys(make_model, tokens):
    """n is the number of visible keys for queries, keys and values alike: the first token is as warm as the last."""
    options = {"attention": "softmax+selective", "temperature_parts": "position", "temperature_on": "query+key+value"}
    model = make_model(architecture="encoder", position="none", layers=1, **options)
    seen = []
    taus = model.blocks[0].attention.temperatures
    for tau in (taus.query, taus.key, taus.value):
        tau.position.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model(tokens, valid=torch.arange(20).expand(3, -1) < torch.tensor([[20], [9], [4]]))
    assert len(seen) == 3
    for count in seen:
        assert count.expand(3, 1, 20)[:, 0, :4].tolist() == [[20] * 4, [9] * 4, [4] * 4]


def test_segment_types(make_model, tokens):
    model = make_model(architecture="encoder", segment_types=2)
    types = (torch.arange(20) >= 12).long().expand(3, -1)
    assert torch.equal(model(tokens), model(tokens, segment_types=torch.zeros_like(types)))
    assert not torch.allclose(model(tokens), model(tokens, segment_types=types))
    with pytest.raises(ValueError, match=r"config\.segment_types > 0"):
        make_model(architecture="encoder")(tokens, segment_types=types)


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("embedding_norm", [True, False])
def test_norms_stand_where_the_config_says(make_model, tokens, placement, embedding_norm):
    model = make_model(architecture="encoder", norm_placement=placement, embedding_norm=embedding_norm, norm="layer")
    names = dict(model.named_parameters())
    assert ("embedding_norm.weight" in names) == embedding_norm
    assert ("norm.weight" in names) == (placement == "pre")
    assert model(tokens).isfinite().all()
    loss = model(tokens).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_save_and_load_give_the_same_class_and_numbers(make_model, tokens, tmp_path):
    model = make_model(architecture="encoder", position="t5", segment_types=2, embedding_norm=True)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, Encoder)
    assert torch.equal(model(tokens), loaded(tokens))


def test_one_door_draws_by_seed_and_name():
    config = ModelConfig(architecture="encoder", vocab_size=31, layers=1, width=16, heads=2, position="t5")
    one, two, other = build_model(config, 3), build_model(config, 3), build_model(config, 4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert (one.relative.table == 0).all()
    assert one.training
    decoder = build_model(dataclasses.replace(config, architecture="decoder"), 3)
    for name, parameter in decoder.named_parameters():  # what architectures share starts equal
        assert torch.equal(parameter, one.get_parameter(name)), name


def test_counts_and_operations(make_model):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = make_model(architecture="encoder", segment_types=2, position="learned").float()
    counts = model.count_parameters()
    assert counts.pop("total") == sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["segment"] == 2 * 24
    assert "other" not in counts
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 20, dtype=torch.long)).sum().backward()
    assert counter.get_total_flops() / 60 == pytest.approx(model.flops_per_token(20))
    relative = make_model(architecture="encoder", position="t5").parameter_groups()
    assert any(p.shape == (4, 32) for g in relative if g["name"] == "no_decay" for p in g["params"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "encodr"}, "did you mean 'encoder'"),
        ({"architecture": "encoder", "decoder_layers": 2}, "only architecture=seq2seq has two stacks"),
        ({"segment_types": 2}, "only architecture=encoder has a segment table"),
        ({"architecture": "encoder", "position": "t5", "relative_buckets": 7}, "an even number"),
        ({"position": "t5", "relative_max_distance": 16}, "must lie above the 16 distances"),
        ({"architecture": "encoder", "segment_types": -1}, "at least 0"),
    ],
)
def test_the_config_refuses_what_cannot_be_built(options, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**options)
