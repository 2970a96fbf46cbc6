"""Selective Self-Attention's temperatures against the formula of arXiv 2411.12892 (section 3); the control."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import clearhead.layers.attention
from clearhead.attention.mask import Mask
from clearhead.layers.geometry import Geometry
from clearhead.layers.temperature import LearnedTemperatures, PositionPart, SelectiveTemperatures
from clearhead.models.config import PRESETS, ModelConfig
from clearhead.models.decoder import Decoder

torch.set_num_threads(1)
B, T, HEADS, KV_HEADS, D = 2, 5, 4, 2, 3
SMALL = {"vocab_size": 31, "context": 32, "layers": 2, "width": 24, "heads": 4}


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def geometry(counts: list[int]) -> Geometry:
    count = torch.tensor(counts)
    return Geometry(positions=count[None] - 1, mask=Mask.causal(), visible=count[None, None])


@pytest.mark.parametrize("granularity", ["shared", "head_slice", "head_full"])
@pytest.mark.parametrize("parts", ["token+position", "token", "position"])
@pytest.mark.parametrize("slope_rule", ["sigmoid", "linear"])
def test_tau_is_one_plus_tanh_plus_slope_log_n(granularity, parts, slope_rule):
    module = SelectiveTemperatures(
        HEADS, KV_HEADS, D, on=("query", "key", "value"), granularity=granularity, parts=parts, slope=slope_rule
    ).double()
    randomise(module)
    q, k, v = (torch.randn(B, T, heads * D).double() for heads in (HEADS, KV_HEADS, KV_HEADS))
    tau = module(q, k, v, geometry([1, 2, 3, 4, 5]))

    for name, projection, heads in (("query", q, HEADS), ("key", k, KV_HEADS), ("value", v, KV_HEADS)):
        part = getattr(module, name).requires_grad_(False)
        got = getattr(tau, name).detach()
        assert got.shape == (B, heads, T, 1)
        for b in range(B):
            for h in range(heads):
                for t in range(T):
                    expected = 1.0
                    if "token" in parts:
                        vector = part.token.vector[0 if granularity == "shared" else h]
                        x = projection[b, t]
                        x = x[h * D : (h + 1) * D] if granularity == "head_slice" else x
                        gelu = [float(u) * 0.5 * (1 + math.erf(float(u) / math.sqrt(2))) for u in x]
                        expected += math.tanh(sum(float(w) * u for w, u in zip(vector, gelu)))
                    if "position" in parts:
                        a = float(part.position.slope)
                        slope = 1 / (1 + math.exp(-a)) if slope_rule == "sigmoid" else a
                        expected += slope * math.log(t + 1)
                    assert float(got[b, h, t, 0]) == pytest.approx(expected, abs=1e-12)


def test_the_first_position_of_the_position_part_is_one_and_the_slope_starts_as_released():
    # tau_pos(1) = 1. The authors' GPT-2 code starts at slope 0.0113, alpha = -4.47.
    part = PositionPart("sigmoid")
    assert part(torch.tensor([1])).item() == 0.0
    assert torch.sigmoid(part.slope).item() == pytest.approx(0.0113, abs=5e-5)
    assert part.slope.item() == pytest.approx(-4.47, abs=5e-3)


def test_bf16_projections_get_fp32_temperatures():
    module = SelectiveTemperatures(HEADS, KV_HEADS, D, granularity="head_full")
    randomise(module)
    q, k, v = (torch.randn(B, T, heads * D) for heads in (HEADS, KV_HEADS, KV_HEADS))
    exact = module(q, k, v, geometry([1, 2, 3, 4, 5]))
    rough = module.bfloat16()(q.bfloat16(), k.bfloat16(), v.bfloat16(), geometry([1, 2, 3, 4, 5]))
    assert rough.query.dtype == torch.float32
    torch.testing.assert_close(rough.query, exact.query, rtol=0.05, atol=0.05)
    # ln n in bf16 could not tell 4000 from 4010.
    part = PositionPart("linear").bfloat16()
    with torch.no_grad():
        part.slope.fill_(1.0)
    low, high = part(torch.tensor([4000, 4010])).tolist()
    assert high - low == pytest.approx(math.log(4010 / 4000), rel=1e-3)


def test_learned_is_one_scalar_per_head_starting_at_one():
    module = LearnedTemperatures(HEADS)
    tau = module(torch.empty(B, T, 1), torch.empty(0), torch.empty(0), geometry([1]))
    assert tau.query.shape == (1, HEADS, 1, 1)
    assert (tau.query == 1).all()
    assert tau.key is None
    assert tau.value is None


# ---- inside the layer ----


@pytest.fixture
def calls(monkeypatch):
    """Every call of `attend` that the attention layers make: (query, temperatures)."""
    made = []
    real = clearhead.layers.attention.attend

    def spy(q, k, v, spec, **options):
        made.append((q, options["temperatures"]))
        return real(q, k, v, spec, **options)

    monkeypatch.setattr(clearhead.layers.attention, "attend", spy)
    return made


def counting_model(**options) -> Decoder:
    """tau = 1 + ln n exactly, so that exp(tau - 1) reads the count."""
    model = Decoder(ModelConfig(**(SMALL | options), temperature_parts="position", temperature_slope="linear")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("slope"):
                parameter.fill_(1.0)
    return model


def counts(tau: torch.Tensor) -> list[list[int]]:
    return torch.exp(tau[:, 0, :, 0] - 1).round().int().tolist()


def test_n_counts_visible_keys_for_queries_and_own_positions_for_values(calls):
    model = counting_model(attention="softmax+selective+window:3", temperature_on="query+key+value")
    model(torch.zeros(1, 6, dtype=torch.long))
    tau = calls[0][1]
    assert counts(tau.query) == [[1, 2, 3, 3, 3, 3]]
    assert counts(tau.value) == counts(tau.key) == [[1, 2, 3, 4, 5, 6]]


def test_n_restarts_in_packed_documents_and_counts_from_the_first_valid_token(calls):
    model = counting_model(attention="laser+selective")
    tokens = torch.zeros(2, 6, dtype=torch.long)
    model(tokens, segments=torch.tensor([[7, 7, 1, 1, 1, 2]] * 2))
    assert counts(calls[0][1].query) == [[1, 2, 1, 2, 3, 1]] * 2
    assert counts(calls[0][1].value) == [[1, 2, 1, 2, 3, 1]] * 2

    calls.clear()
    model(tokens, valid=torch.tensor([[True] * 6, [False] * 2 + [True] * 4]))
    assert counts(calls[0][1].query)[0] == [1, 2, 3, 4, 5, 6]
    assert counts(calls[0][1].query)[1][2:] == [1, 2, 3, 4]
    assert counts(calls[0][1].value)[1][2:] == [1, 2, 3, 4]


@torch.no_grad()
def test_n_goes_on_with_a_cache(calls):
    # The released code restarts at ln 1 with every decode step.
    model = counting_model(attention="softmax+selective+window:4")
    state = model.new_state(2, 9)
    tokens = torch.zeros(2, 5, dtype=torch.long)
    model(tokens, valid=torch.tensor([[True] * 5, [False] * 3 + [True] * 2]), state=state)
    calls.clear()
    model(tokens[:, :2], state=state)
    assert counts(calls[0][1].query) == [[4, 4], [3, 4]]
    assert counts(calls[0][1].value) == [[6, 7], [3, 4]]


def test_token_part_reads_the_projection_before_rotary(calls):
    model = Decoder(ModelConfig(**SMALL, attention="softmax+selective", position="rope", temperature_parts="token"))
    randomise(model)
    model(torch.full((1, 8), 5))  # the same token everywhere: before rotary all projections of layer 0 are equal
    query, tau = calls[0]
    assert (query[:, :, 1:] - query[:, :, :1]).abs().max() > 0.1
    torch.testing.assert_close(tau.query, tau.query[:, :, :1].expand_as(tau.query))
    assert (tau.query - 1).abs().max() > 1e-3


def test_token_part_reads_before_qk_norm_and_tau_comes_after_it(calls):
    model = Decoder(ModelConfig(**SMALL, attention="softmax+selective", qk_norm=True, position="none"))
    randomise(model)
    block = model.blocks[0]
    with torch.no_grad():
        block.attention.query_norm.weight.fill_(1.0)
    tokens = torch.arange(8)[None]
    model(tokens)
    query, tau = calls[0]

    # attend gets the normed query and the temperature apart, so the norm cannot cancel it ...
    torch.testing.assert_close(query.pow(2).mean(-1), torch.ones(1, 4, 8))
    # ... and the temperature was read from the projection before the norm.
    projection_bthd = block.attention.query(block.attention_residual.norm(model.embedding(tokens))).unflatten(
        -1, (4, 6)
    )
    part = block.attention.temperatures.query
    token_part = torch.tanh(torch.einsum("bthd,hd->bht", F.gelu(projection_bthd), part.token.vector))
    position_part = torch.sigmoid(part.position.slope) * torch.arange(1, 9).log()
    torch.testing.assert_close(tau.query[..., 0], 1 + token_part + position_part)


@pytest.mark.parametrize("granularity", ["shared", "head_slice", "head_full"])
def test_linear_slope_starts_as_the_exact_identity_with_living_gradients(granularity):
    tokens = torch.randint(0, 31, (2, 16), generator=torch.Generator().manual_seed(0))
    plain = Decoder(ModelConfig(**SMALL, attention="softmax"))
    selective = Decoder(
        ModelConfig(
            **SMALL,
            attention="softmax+selective",
            temperature_slope="linear",
            temperature_granularity=granularity,
            temperature_on="query+key+value",
        )
    )
    for model in (plain, selective):
        model.init_parameters(3)
    assert torch.equal(plain(tokens), selective(tokens))
    F.cross_entropy(selective(tokens).flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in selective.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_sigmoid_slope_starts_close_to_the_identity():
    model = Decoder(ModelConfig(**SMALL, attention="softmax+selective"))
    temperatures = model.blocks[0].attention.temperatures
    tau = temperatures(*(torch.randn(1, 32, 24) for _ in range(3)), geometry(list(range(1, 33))))
    assert (tau.query - 1).min() == 0
    assert 0.03 < (tau.query - 1).max() < 0.05  # 0.0113 * ln 32 = 0.039


@pytest.mark.parametrize("granularity", ["shared", "head_slice", "head_full"])
def test_weight_sharing_adds_less_than_half_a_percent(granularity):
    # The paper's claim (section 3), at the size of GPT-2 124M, where three vectors a layer are 0.022 %.
    options = PRESETS["large"].to_dict() | {"temperature_granularity": granularity}
    with torch.device("meta"):
        plain = Decoder(ModelConfig.from_dict(options))
        selective = Decoder(ModelConfig.from_dict(options | {"attention": "softmax+selective"}))
    extra = selective.count_parameters()["total"] - plain.count_parameters()["total"]
    assert extra == selective.count_parameters()["temperature"]
    assert 0 < extra < 0.005 * plain.count_parameters()["total"]
