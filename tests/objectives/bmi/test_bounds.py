"""Critic and estimators against distributions whose information is known (M1, M2)."""

from __future__ import annotations

import math

import pytest
import torch

from clearhead.objectives.bmi import bounds
from clearhead.objectives.bmi.critic import Critic
from clearhead.objectives.bmi.nsp import nsp_accuracy, nsp_loss

TABLE = torch.tensor(
    [
        [0.040095, 0.003047, 0.000011, 0.000001, 0.083455],
        [0.117980, 0.034636, 0.060230, 0.024926, 0.126847],
        [0.084252, 0.000000, 0.097792, 0.000006, 0.060270],
        [0.000841, 0.099781, 0.024629, 0.004177, 0.011717],
        [0.000004, 0.000298, 0.046793, 0.042057, 0.036157],
    ],
    dtype=torch.float64,
)
"""A joint of 5 x 5 (rows x, columns y) with I = 0.364662 nats, as printed: six digits."""


@pytest.fixture(scope="module")
def table():
    joint = TABLE / TABLE.sum()
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return joint, apart


def test_a_table_critic_that_learns_next_segments_finds_the_pointwise_information(table):
    """M1: PMI to 1e-3 wherever the pair occurs, and the Donsker-Varadhan value 0.3647."""
    joint, apart = table
    score = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [score], max_iter=2000, tolerance_grad=1e-14, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = -bounds.jensen_shannon(score, score, joint_weights=joint, apart_weights=apart)
        value.backward()
        return value

    optimizer.step(loss)
    occurs = joint > 0
    pmi = (joint / apart).log()
    assert torch.allclose(score.detach()[occurs], pmi[occurs], atol=1e-3)
    found = bounds.donsker_varadhan(score.detach(), score.detach(), joint_weights=joint, apart_weights=apart)
    assert found.item() == pytest.approx(0.3647, abs=1e-4)


def test_every_estimate_is_exact_at_its_own_best_critic(table):
    joint, apart = table
    pmi = torch.where(joint > 0, (joint / apart).log(), -torch.inf)
    finite = pmi.clamp_min(-80.0)
    information = (joint * finite).sum().item()
    weights = {"joint_weights": joint, "apart_weights": apart}
    assert information == pytest.approx(0.364662, abs=2e-5)  # the table has six digits
    assert bounds.donsker_varadhan(finite, finite, **weights).item() == pytest.approx(information, abs=1e-12)
    assert bounds.donsker_varadhan(finite + 3.0, finite + 3.0, **weights).item() == pytest.approx(
        information, abs=1e-12
    )
    assert bounds.nwj(finite + 1.0, finite + 1.0, **weights).item() == pytest.approx(information, abs=1e-12)
    assert bounds.mean_score(finite, joint_weights=joint).item() == pytest.approx(information, abs=1e-12)
    middle = (joint + apart) / 2
    divergence = 0.5 * (torch.special.xlogy(joint, joint / middle) + apart * (apart / middle).log()).sum().item()
    assert bounds.jensen_shannon(finite, finite, **weights).item() == pytest.approx(
        2 * divergence - 2 * math.log(2), abs=1e-12
    )
    assert bounds.jensen_shannon(finite, finite, **weights).item() == pytest.approx(-1.188315, abs=2e-5)


def test_the_gradient_of_next_segment_prediction_vanishes_at_the_pointwise_information(table):
    joint, apart = table
    joint = (joint + 1e-6) / (joint + 1e-6).sum()
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    score = (joint / apart).log().requires_grad_()
    bounds.jensen_shannon(score, score, joint_weights=joint, apart_weights=apart).backward()
    assert score.grad.abs().max() < 1e-15


def test_bounds_stay_below_whatever_the_critic(table):
    joint, apart = table
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        score = 3 * torch.randn(5, 5, dtype=torch.float64, generator=generator)
        for bound in (bounds.donsker_varadhan, bounds.nwj):
            assert bound(score, score, joint_weights=joint, apart_weights=apart) < 0.364662
    rows = 5 * torch.randn(100, 8, dtype=torch.float64, generator=generator)
    assert bounds.info_nce(rows) < math.log(8)
    rows[:, 0] = 1e4  # sure of every pair: the estimate stands at its ceiling
    assert bounds.info_nce(rows).item() == pytest.approx(math.log(8))


def test_loss_is_minus_the_jensen_shannon_value_and_accuracy_counts_sides():
    joint, apart = torch.tensor([2.0, -1.0, 3.0, 1.0]), torch.tensor([-1.0, -2.0, 0.0, 4.0])
    assert nsp_loss(joint, apart).item() == pytest.approx(-bounds.jensen_shannon(joint, apart).item())
    assert nsp_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(2 * math.log(2))
    assert nsp_accuracy(joint, apart).item() == pytest.approx((3 / 4 + 2.5 / 4) / 2)


def test_scores_of_a_thousand_stay_finite():
    joint, apart = torch.tensor([1e3, -1e3]), torch.tensor([1e3, -1e3])
    assert nsp_loss(joint, apart).item() == pytest.approx(1e3)
    assert bounds.donsker_varadhan(joint, apart).isfinite()


def gaussians(rho, count, generator):
    x = torch.randn(count, 4, generator=generator)
    return x, rho * x + math.sqrt(1 - rho * rho) * torch.randn(count, 4, generator=generator)


@pytest.mark.parametrize("rho", [0.3, 0.6])
def test_the_critic_finds_the_information_of_gaussians(rho):
    """M2: I = -2 log(1 - rho^2); E_P[T] within 10 % for I < 2 nats, scored on pairs it has not seen."""
    generator = torch.Generator().manual_seed(0)
    critic = Critic(4, hidden=96, dropout=0.0, seed=0)
    steps = 1500
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, y = gaussians(rho, 1024, generator)
        loss = nsp_loss(critic(x, y), critic(x, y.roll(1, 0)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    information = -2 * math.log(1 - rho * rho)
    with torch.no_grad():
        x, y = gaussians(rho, 60_000, generator)
        joint, apart = critic(x, y), critic(x, y.roll(1, 0))
        choices = torch.stack([critic(x[:4000], y[:4000].roll(s, 0)) for s in range(8)], dim=1)
    assert bounds.mean_score(joint).item() == pytest.approx(information, rel=0.10)
    assert bounds.nwj(joint + 1, apart + 1).item() == pytest.approx(information, rel=0.10)
    assert bounds.info_nce(choices).item() < min(information, math.log(8))


def test_contrast_saturates_at_the_logarithm_of_its_choices():
    """M2 at rho = 0.9, I = 3.32: the best critic itself gets no more than log K out of K choices."""
    rho, generator = 0.9, torch.Generator().manual_seed(0)
    x, y = (v.double() for v in gaussians(rho, 4000, generator))

    def pmi(x, y):
        quadratic = rho * x * y - rho * rho * (x * x + y * y) / 2
        return (quadratic / (1 - rho * rho) - 0.5 * math.log(1 - rho * rho)).sum(-1)

    assert bounds.mean_score(pmi(x, y)).item() == pytest.approx(-2 * math.log(1 - rho * rho), rel=0.03)
    for k in (4, 16):
        choices = torch.stack([pmi(x, y.roll(s, 0)) for s in range(k)], dim=1)
        assert 0.8 * math.log(k) < bounds.info_nce(choices).item() < math.log(k)


def test_the_critic_is_its_formula_and_minds_the_order():
    critic = Critic(3, hidden=7, dropout=0.5, seed=2).double().eval()
    a, b = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    forth = critic.forth(torch.cat([a, b, a - b, a * b, (a - b).abs()], -1))
    back = critic.back(torch.cat([b, a, b - a, a * b, (a - b).abs()], -1))
    assert torch.equal(critic(a, b), ((forth + back) / 2)[:, 0])
    assert not torch.allclose(critic(a, b), critic(b, a))
    again = Critic(3, hidden=7, dropout=0.5, seed=2).double().eval()
    assert torch.equal(critic(a, b), again(a, b))
    with pytest.raises(ValueError, match="vectors of size 3"):
        critic(a[:, :2], b)
