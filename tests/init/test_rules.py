"""The residual rules: formula, precision, buffers, compiled graphs, optimizer groups."""

from __future__ import annotations

import copy

import pytest
import torch

from clearhead.layers.norms import make_norm
from clearhead.layers.residual import ConstantOmegaSum, OmegaSum, PlainSum, ProfiledOmegaSum, ScaledSum, make_residual
from clearhead.layers.scale import Scale
from clearhead.models.config import ModelConfig
from clearhead.models.decoder import Decoder

torch.set_num_threads(1)


@pytest.fixture
def stream() -> torch.Tensor:
    return torch.randn(2, 3, 8, dtype=torch.float64)


@pytest.fixture
def branch() -> torch.Tensor:
    return torch.randn(2, 3, 8, dtype=torch.float64)


def test_formulas(stream, branch):
    omega = OmegaSum(8).double()
    with torch.no_grad():
        omega.omega.copy_(torch.arange(1.0, 9.0))
    assert torch.equal(PlainSum()(stream, branch), stream + branch)
    torch.testing.assert_close(ScaledSum(0.75, 0.5)(stream, branch), 0.75 * stream + 0.5 * branch)
    torch.testing.assert_close(omega(stream, branch), torch.arange(1.0, 9.0).double() * stream + branch)
    torch.testing.assert_close(ConstantOmegaSum(1.5)(stream, branch), 1.5 * stream + branch)
    torch.testing.assert_close(Scale(0.25)(stream), 0.25 * stream)


def test_what_the_state_dict_holds():
    assert not PlainSum().state_dict()
    assert set(ScaledSum(0.5, 0.25).state_dict()) == {"stream_scale", "branch_scale"}
    assert not list(ScaledSum(0.5, 0.25).parameters())
    assert ConstantOmegaSum(2.0).state_dict()["omega"].shape == (1,)
    assert set(ProfiledOmegaSum(8).state_dict()) == {"omega", "profiled"}
    assert not ProfiledOmegaSum(8).profiled


@pytest.mark.parametrize("rule", [ScaledSum(0.9948, 0.1021), ConstantOmegaSum(1.0312), Scale(0.0713)])
def test_constants_stay_exact_in_half_precision(rule):
    """bf16 would round 0.9948 to 0.9961, the same way in every layer."""
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    half = copy.deepcopy(rule).to(torch.bfloat16).half()
    for name, value in half.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    assert rule.to("meta").state_dict()[next(iter(before))].is_meta  # devices are followed


def test_half_precision_streams_are_added_in_fp32(stream, branch):
    rule = ScaledSum(0.9948, 0.1021).to(torch.bfloat16)
    x, f = stream.bfloat16(), branch.bfloat16()
    assert torch.equal(rule(x, f), (0.9948 * x.float() + 0.1021 * f.float()).bfloat16())
    x = torch.full((1, 1, 100_000), 1.0, dtype=torch.bfloat16)
    assert rule(x, x).dtype == torch.bfloat16
    assert rule(x.float(), x).dtype == torch.float32  # under autocast the stream is fp32


def test_dropout_is_on_the_branch_only(stream):
    residual = make_residual("pre", torch.nn.Identity(), rule=ScaledSum(0.5, 2.0), dropout=0.5)
    x = torch.ones(1, 1, 1000)
    out = residual(x, lambda h: torch.ones_like(h))
    assert sorted(out.unique().tolist()) == [0.5, 4.5]  # 0.5 x + 2 f / (1 - p), or the stream alone


@pytest.mark.parametrize(
    ("init", "placement"),
    [
        ("deepscale", "pre"),
        ("admin", "post"),
        pytest.param("deepscale", "post", marks=pytest.mark.full),
        pytest.param("admin_constant", "post", marks=pytest.mark.full),
    ],
)
def test_a_compiled_model_is_the_same_in_one_graph(init, placement):
    torch._dynamo.reset()
    options = {"deepscale_k": 0.5, "feed_forward": "relu", "position": "none"}
    model = Decoder(ModelConfig(layers=1, width=32, heads=2, init=init, norm_placement=placement, **options)).eval()
    tokens = torch.arange(24).view(2, 12)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(tokens)
    torch.testing.assert_close(compiled(tokens), expected, rtol=1e-5, atol=1e-5)
    compiled(tokens).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_buffer_that_changes_changes_the_compiled_model():
    rule = ScaledSum(1.0, 1.0)
    compiled = torch.compile(rule, backend="aot_eager", fullgraph=True)
    x = torch.ones(4)
    assert compiled(x, x)[0] == 2.0
    rule.load_state_dict({"stream_scale": torch.tensor(3.0), "branch_scale": torch.tensor(0.5)})
    assert compiled(x, x)[0] == 3.5


def test_omega_has_a_group_without_decay():
    model = Decoder(ModelConfig(layers=2, width=32, heads=2, init="admin", norm_placement="post"))
    groups = {group["name"]: group for group in model.parameter_groups()}
    omegas = [p for name, p in model.named_parameters() if name.endswith("omega")]
    assert len(omegas) == 4
    assert {id(p) for p in groups["residual"]["params"]} == {id(p) for p in omegas}
    assert groups["residual"]["weight_decay_scale"] == 0.0
    plain = Decoder(ModelConfig(layers=2, width=32, heads=2))
    assert "residual" not in [group["name"] for group in plain.parameter_groups()]


def test_post_norm_reads_the_scaled_sum(stream):
    norm = make_norm("layer", 8).double()
    residual = make_residual("post", norm, rule=ConstantOmegaSum(2.0))
    torch.testing.assert_close(residual(stream, torch.sin), norm(2.0 * stream + torch.sin(stream)))
