"""Norms, feed-forward, residual, gates: each against its formula."""

from __future__ import annotations

import pytest
import torch

from clearhead.layers.feed_forward import make_feed_forward
from clearhead.layers.gate import make_gate
from clearhead.layers.norms import make_norm
from clearhead.layers.residual import ScaledSum, make_residual

torch.set_num_threads(1)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_norms(x):
    rms, layer = make_norm("rms", 8).double(), make_norm("layer", 8).double()
    torch.testing.assert_close(rms(3 * x), x / x.pow(2).mean(-1, keepdim=True).sqrt(), rtol=1e-5, atol=1e-5)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / centred.pow(2).mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(layer(3 * x + 4), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="expected 'rms' or 'layer', got 'batch'"):
        make_norm("batch", 8)


def test_feed_forward(x):
    torch.manual_seed(0)
    for kind, activation in (("relu", torch.relu), ("gelu", torch.nn.functional.gelu)):
        f = make_feed_forward(kind, 8, 12).double()
        torch.testing.assert_close(f(x), activation(x @ f.up.weight.T) @ f.down.weight.T)
    f = make_feed_forward("swiglu", 8, 12).double()
    gate = x @ f.gate.weight.T
    torch.testing.assert_close(f(x), (gate * torch.sigmoid(gate) * (x @ f.up.weight.T)) @ f.down.weight.T)
    with pytest.raises(ValueError, match="got 'silu'"):
        make_feed_forward("silu", 8, 12)


def test_residual_placements_and_rule(x):
    norm = make_norm("layer", 8).double()

    def branch(h):
        return 3 * h

    torch.testing.assert_close(make_residual("pre", norm)(x, branch), x + 3 * norm(x))
    torch.testing.assert_close(make_residual("post", norm)(x, branch), norm(x + 3 * x))
    scaled = make_residual("pre", norm, rule=ScaledSum(0.5, 2.0))
    torch.testing.assert_close(scaled(x, branch), 0.5 * x + 6 * norm(x))
    with pytest.raises(ValueError, match="expected 'pre' or 'post'"):
        make_residual("sandwich", norm)


@pytest.mark.parametrize(("kind", "parameters"), [("fixed", 4), ("head", 8 * 4), ("element", 8 * 12)])
def test_gates_start_as_the_identity_with_living_gradients(x, kind, parameters):
    gate = make_gate(kind, width=8, heads=4, head_dim=3).double()
    values = gate.start_values()
    with torch.no_grad():
        for name, parameter in gate.named_parameters():
            parameter.fill_(values[name])
    out = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    assert torch.equal(gate(out, x), out)
    gate(out, x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in gate.parameters())
    assert sum(p.numel() for p in gate.parameters()) == parameters


def test_gates_by_the_formula(x):
    out = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    fixed = make_gate("fixed", 8, 4, 3).double()
    head = make_gate("head", 8, 4, 3).double()
    element = make_gate("element", 8, 4, 3).double()
    with torch.no_grad():
        fixed.scale.copy_(torch.arange(4.0))
    torch.testing.assert_close(fixed(out, x)[:, 2], 2 * out[:, 2])
    g = 2 * torch.sigmoid(x @ head.projection.weight.T)  # [b, n, h]
    torch.testing.assert_close(head(out, x)[1, 3, 4], g[1, 4, 3] * out[1, 3, 4])
    g = 2 * torch.sigmoid(x @ element.projection.weight.T)  # [b, n, h * d]
    torch.testing.assert_close(element(out, x)[1, 3, 4], g[1, 4, 9:12] * out[1, 3, 4])
    assert make_gate("none", 8, 4, 3) is None
    with pytest.raises(ValueError, match="got 'soft'"):
        make_gate("soft", 8, 4, 3)
