"""Position ids, rotary, sinusoidal."""

from __future__ import annotations

import math

import torch

from clearhead.layers.position.ids import position_ids
from clearhead.layers.position.rope import Rotation
from clearhead.layers.position.sinusoidal import SinusoidalPosition, sinusoid


def test_positions_count_from_the_first_valid_token_and_restart_at_segments():
    assert position_ids(4).tolist() == [[0, 1, 2, 3]]
    segments = torch.tensor([[3, 3, 0, 0, 0, 3], [1, 1, 1, 1, 1, 1]])
    assert position_ids(6, segments_bt=segments).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    assert position_ids(4, first_b=torch.tensor([0, 2])).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert position_ids(6, segments_bt=segments, first_b=torch.tensor([1, 4])).tolist() == [
        [0, 0, 0, 1, 2, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert position_ids(2, offset_b=torch.tensor([5, 0])).tolist() == [[5, 6], [0, 1]]


def test_rotated_scores_depend_on_the_distance_only_and_norms_stay():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 1, 8, generator=generator, dtype=torch.float64) for _ in range(2))

    def at(x, position):
        return Rotation.at(torch.tensor([[position]]), 8)(x)

    def score(i, j):
        return (at(q, i) * at(k, j)).sum(-1)

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-4, atol=1e-4)  # angles are fp32
    assert (score(9, 4) - score(9, 5)).abs().max() > 1e-2
    torch.testing.assert_close(at(q, 77).norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(at(q, 0), q)


def test_rotation_of_bf16_is_as_good_as_bf16_allows_at_far_positions():
    x = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(0))
    far = torch.tensor([[100_003]])
    rotated = Rotation.at(far, 64)(x.bfloat16())
    assert rotated.dtype == torch.bfloat16
    frequency = torch.tensor([10000.0 ** (-i / 32) for i in range(32)], dtype=torch.float64)
    turn = torch.polar(torch.ones(32, dtype=torch.float64), 100_003 * frequency)
    z = torch.complex(x.bfloat16().double()[..., :32], x.bfloat16().double()[..., 32:]) * turn
    expected = torch.cat((z.real, z.imag), dim=-1)
    # fp32 angles at 100 003 are good to about 0.004 radians.
    torch.testing.assert_close(rotated.double(), expected, rtol=0.02, atol=0.02)


def test_sinusoid_by_the_formula():
    table = sinusoid(torch.tensor([[0, 1, 50]]), 6)
    for column, position in enumerate((0, 1, 50)):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert math.isclose(table[0, column, i], math.sin(angle), abs_tol=1e-5)
            assert math.isclose(table[0, column, i + 3], math.cos(angle), abs_tol=1e-5)


def test_sinusoidal_positions_start_as_loud_as_embeddings():
    added = SinusoidalPosition(64)(torch.arange(100)[None])
    assert math.isclose(added.pow(2).mean().sqrt(), 0.02, rel_tol=1e-3)
