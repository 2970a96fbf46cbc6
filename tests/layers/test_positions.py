"""Position ids, rotary, sinusoidal, Transformer-XL."""

from __future__ import annotations

import math

import torch
from tests.attention.test_linear_length import BACKWARD, FORWARD, Largest, opened

from clearhead.attention.attend import attend
from clearhead.attention.mask import Mask
from clearhead.layers.position.ids import position_ids
from clearhead.layers.position.rope import Rotation
from clearhead.layers.position.sinusoidal import SinusoidalPosition, sinusoid
from clearhead.layers.position.transformer_xl import RelativeXL


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


def test_transformer_xl_equals_the_written_out_form_with_its_shift_and_a_memory_longer_than_the_segment():
    """A_ij = (q_i + u) k_j + (q_i + v) W R_{i-j} by the published shift: distances M+L-1 .. 0 as columns, a zero column
    before them, reshaped, the first row dropped. Output and gradients of q, k, u, v and W, in float64."""
    torch.manual_seed(4)
    heads, d, p, length, memory = 3, 6, 10, 7, 19
    keys = memory + length
    part = RelativeXL(heads, d, p).double()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_()
    q = torch.randn(2, heads, length, d, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, heads, keys, d, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, heads, keys, d, dtype=torch.float64)
    leaves, weight = (q, k, *part.parameters()), torch.randn(2, heads, length, d, dtype=torch.float64)

    places = torch.arange(-memory, length)[None]
    rotation, own = (Rotation.at(x, p, dtype=torch.float64) for x in (places, places[:, memory:]))
    longer = part.query(q, own), part.key(k, rotation)
    results = [
        attend(*longer, value, mask=Mask.causal(), scale=d**-0.5, backend=name).out
        for name in ("chunked", "sdpa", "reference")
    ]

    distance = torch.arange(keys - 1, -1, -1, dtype=torch.float64)[:, None]
    angle = distance * 10000.0 ** (-2.0 * torch.arange(p // 2, dtype=torch.float64) / p)
    r_tp = torch.cat((angle.sin(), angle.cos()), dim=-1)
    projected = torch.einsum("hdp,tp->htd", part.distance.weight.view(heads, d, p), r_tp)
    u, v = (x.view(heads, 1, d) for x in (part.content_bias, part.distance_bias))
    by_distance = (q + v) @ projected.mT
    shifted = torch.nn.functional.pad(by_distance, (1, 0)).view(2, heads, keys + 1, length)[:, :, 1:]
    scores = ((q + u) @ k.mT + shifted.view(2, heads, length, keys)) * d**-0.5
    hidden = torch.arange(keys)[None] > torch.arange(length)[:, None] + memory
    expected = scores.masked_fill(hidden, -math.inf).softmax(-1) @ value
    true = [expected, *torch.autograd.grad((expected * weight).sum(), leaves)]
    for out in results:
        ours = [out, *torch.autograd.grad((out * weight).sum(), leaves, retain_graph=True)]
        for mine, other in zip(ours, true, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_transformer_xl_makes_nothing_of_length_by_length():
    """Longer queries and keys are all it adds: forward and backward, no tensor grows faster than the length."""

    def largest(n):
        part = RelativeXL(1, 8, 8)
        q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3))
        with opened(*FORWARD), Largest() as forward, torch.no_grad():
            rotation = Rotation.at(torch.arange(n)[None], 8)
            attend(part.query(q, rotation), part.key(k, rotation), v, mask=Mask.causal(), backend="chunked")
        rotation = Rotation.at(torch.arange(n)[None], 8)
        out = attend(part.query(q, rotation), part.key(k, rotation), v, mask=Mask.causal(), backend="chunked").out
        with opened(*BACKWARD), Largest() as backward:
            out.sum().backward()
        return forward.elements, backward.elements

    for short, long in zip(largest(1024), largest(2048), strict=True):
        assert long <= 2 * short
        assert long < 2048**2 / 8
