"""BigBird's pattern: what each block sees, the law of the random blocks, and what the released code gets wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from clearhead import functional as F
from clearhead.attention.attend import attend
from clearhead.attention.bias import ALiBi, DenseBias
from clearhead.attention.bigbird import BlockLayout, drawn_blocks, key_blocks
from clearhead.attention.explain import explain
from clearhead.attention.mask import Mask
from clearhead.attention.spec import AttentionSpec
from clearhead.attention.t5 import T5Bias
from clearhead.errors import UserError

BLOCKS = 12


def layout(*, causal=False, random=3, window=3, global_blocks=2, seed=0, released=False, tokens=0, block=64):
    return BlockLayout(block, global_blocks, window, random, seed, tokens, released, causal)


@pytest.mark.parametrize("random", [0, 2, 3])
def test_each_row_sees_as_many_blocks_as_the_paper_says(random):
    counts = [len(key_blocks(layout(random=random), row, head, BLOCKS)) for head in range(6) for row in range(BLOCKS)]
    expected = [BLOCKS, 4 + random, *[5 + random] * (BLOCKS - 4), 4 + random, BLOCKS]
    assert counts == expected * 6


def test_rows_see_their_window_and_the_global_blocks_and_do_not_wrap_around():
    for row in range(1, BLOCKS - 1):
        seen = key_blocks(layout(random=0), row, 0, BLOCKS)
        assert seen == sorted({0, BLOCKS - 1, row - 1, row, row + 1})


def test_causal_rows_see_the_past_only():
    for row in range(BLOCKS):
        seen = key_blocks(layout(causal=True), row, 0, BLOCKS)
        assert max(seen) == row
        assert {row, max(row - 1, 0), max(row - 2, 0), 0, min(1, row)} <= set(seen)
        assert len(seen) == min(row + 1, 8)


def test_random_blocks_are_uniform_over_the_rest_and_never_repeat():
    draws = layout().random_blocks(range(3000), 16)[:, 6]
    allowed = [1, 2, 3, 4, *range(8, 15)]
    values, counts = np.unique(draws, return_counts=True)
    assert values.tolist() == allowed
    assert stats.chisquare(counts).pvalue > 1e-4
    assert all(len(set(row)) == 3 for row in draws.tolist())


def test_pairs_of_random_blocks_are_uniform_too():
    draws = np.sort(layout(random=2).random_blocks(range(6000), 9)[:, 4], axis=1)  # candidates 1, 2, 6, 7
    pairs, counts = np.unique(draws, axis=0, return_counts=True)
    assert len(pairs) == 6
    assert stats.chisquare(counts).pvalue > 1e-4


def test_fewer_candidates_than_draws_gives_all_of_them():
    for row in range(1, 7):
        assert key_blocks(layout(), row, 0, 8) == sorted(
            {0, 7, *range(row - 1, row + 2), *key_blocks(layout(), row, 0, 8)}
        )
    assert [key_blocks(layout(), row, 5, 6) for row in range(6)] == [list(range(6))] * 6


def test_heads_and_seeds_draw_different_blocks():
    draws = layout().random_blocks(range(4), 40)
    assert not (draws[0] == draws[1]).all()
    assert not (draws == layout(seed=1).random_blocks(range(4), 40)).all()


def test_a_causal_row_keeps_its_blocks_in_a_longer_sequence():
    short, long = (layout(causal=True).random_blocks(range(3), blocks) for blocks in (10, 50))
    assert (short == long[:, :10]).all()


def test_the_released_plan_stays_in_the_first_1024_tokens():
    draws = layout(released=True).random_blocks(range(50), 64)
    assert draws.max() == 15
    assert layout().random_blocks(range(50), 64).max() > 55


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("blocks", [1, 5, 9, 40])
def test_both_ways_to_draw_agree(causal, released, blocks):
    """A table for kernels, tensor operations for masks, which broadcast over heads and rows as these come."""
    plan = layout(causal=causal, released=released, seed=7)
    table = plan.random_blocks(range(2, 6), blocks)
    heads, rows = torch.arange(2, 6)[:, None, None], torch.arange(blocks)[:, None]
    for draw, found in enumerate(drawn_blocks(plan, heads, rows, torch.tensor(blocks))):
        assert found[..., 0].tolist() == table[:, :, draw].tolist()


def random_qkv(length, heads=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, length, 16, generator=generator, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True])
def test_equals_dense_attention_with_the_same_blocks(causal):
    """The pattern written out from `key_blocks`, softmax from PyTorch; blocks are a set, so none counts twice."""
    length, size = 103, 8
    q, k, v = random_qkv(length)
    plan, blocks = layout(causal=causal, block=size), -(-length // size)
    seen = torch.zeros(1, 2, length, length, dtype=torch.bool)
    for head in range(2):
        for row in range(length):
            for block in key_blocks(plan, row // size, head, blocks):
                seen[0, head, row, block * size : (block + 1) * size] = True
    if causal:
        seen &= torch.ones(length, length, dtype=torch.bool).tril()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(F.bigbird_attention(q, k, v, is_causal=causal, block_size=size), expected)


def test_a_short_input_is_dense_and_a_long_one_after_it_is_not():
    """Public code falls back to dense attention for good after one short batch."""
    q, k, v = random_qkv(60)
    torch.testing.assert_close(F.bigbird_attention(q, k, v, block_size=16), F.softmax_attention(q, k, v))
    q, k, v = random_qkv(400)
    assert not torch.allclose(F.bigbird_attention(q, k, v, block_size=16), F.softmax_attention(q, k, v), atol=1e-3)


def test_training_and_evaluation_see_the_same_blocks():
    q, k, v = random_qkv(400)
    with torch.no_grad():
        once = F.bigbird_attention(q, k, v, block_size=16)
    again = F.bigbird_attention(*(t.requires_grad_() for t in (q, k, v)), block_size=16)
    torch.testing.assert_close(once, again.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_global_tokens_see_and_are_seen_by_all(causal):
    q, k, v = (t.requires_grad_() for t in random_qkv(200))
    mask = Mask.causal() if causal else Mask()
    spec = "bigbird:block_size=8,global_blocks=0,random_blocks=0,global_tokens=3"
    weights = attend(q, k, v, spec, mask=mask, want=["weights"]).extras["weights"][0, 0]
    assert (weights[3:, :3] > 0).all()
    assert bool((weights[:3] > 0).all()) is not causal
    assert (weights[150, 3:130] == 0).all()


def test_two_layers_reach_everything_with_globals_and_few_without():
    """Breadth first over blocks: 2 steps with global blocks; window alone needs about half the length."""

    def steps(plan, blocks):
        reach = np.eye(blocks, dtype=bool)
        edges = np.array([[b in key_blocks(plan, row, 0, blocks) for b in range(blocks)] for row in range(blocks)])
        for count in range(1, blocks + 1):
            reach = (reach.astype(int) @ edges.astype(int)) > 0
            if reach.all():
                return count
        return None

    assert steps(layout(), 64) == 2
    assert steps(layout(global_blocks=0, random=0), 64) == 63
    assert steps(layout(global_blocks=0), 64) <= 8


def test_one_full_layer_finds_the_furthest_of_64_vectors_and_a_sparse_one_only_those_in_sight():
    """The task of the paper's lower bound, with weights made by hand: queries are -x, so the smallest product wins."""
    x_nd = torch.nn.functional.normalize(
        torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), dim=-1
    ).double()
    x_bhnd = x_nd[None, None]
    furthest_n = (x_nd @ x_nd.T).argmin(-1)
    full_nd = F.softmax_attention(-x_bhnd, x_bhnd, x_bhnd, scale=1e6)[0, 0]
    torch.testing.assert_close(full_nd, x_nd[furthest_n], rtol=0, atol=1e-6)
    options = {"block_size": 4, "global_blocks": 2, "window_blocks": 1, "random_blocks": 1}
    sparse_nd = F.bigbird_attention(-x_bhnd, x_bhnd, x_bhnd, scale=1e6, **options)[0, 0]
    spec = "bigbird:block_size=4,global_blocks=2,window_blocks=1,random_blocks=1"
    seen_nm = attend(x_bhnd, x_bhnd, x_bhnd, spec, want=("weights",)).extras["weights"][0, 0] > 0
    in_sight_n = seen_nm[torch.arange(64), furthest_n]
    found_n = (sparse_nd - x_nd[furthest_n]).norm(dim=-1) < 1e-6
    assert torch.equal(found_n, in_sight_n)
    assert 8 < int(in_sight_n.sum()) < 48


def test_the_operation_count_is_linear_in_length():
    """Columns that tiles hold, summed: twice the length, twice the columns, up to the dense global rows."""

    def columns(length):
        mask = AttentionSpec.parse("bigbird:block_size=64").pattern.within(Mask.causal(), 1, length)
        return sum(len(mask.blocks.columns(q, q + 64)[0]) for q in range(0, length, 64))

    assert columns(16384) - columns(8192) == 2 * (columns(8192) - columns(4096)) > 0


@pytest.mark.parametrize("causal", [False, True])
def test_biases_know_the_columns_that_a_tile_gathers(causal):
    """Forward and gradients equal the dense reference; a tile's columns have gaps, which diagonals do not."""
    generator = torch.Generator().manual_seed(3)
    tables = {
        "t5": lambda: T5Bias(
            torch.randn(2, 8, generator=generator, dtype=torch.float64).requires_grad_(), 20, not causal
        ),
        "dense": lambda: DenseBias(
            torch.randn(1, 2, 150, 150, generator=generator, dtype=torch.float64).requires_grad_()
        ),
        "keys": lambda: DenseBias(torch.randn(1, 2, 1, 150, generator=generator, dtype=torch.float64).requires_grad_()),
        "alibi": lambda: ALiBi(torch.rand(2, generator=generator, dtype=torch.float64).requires_grad_()),
    }
    for make in tables.values():
        bias, (q, k, v) = make(), random_qkv(150)
        mask = (Mask.causal() if causal else Mask()) & Mask.key_range(torch.tensor([5]), None)
        outs = [
            attend(q, k, v, "bigbird:block_size=8", mask=mask, bias=bias, backend=name).out
            for name in ("reference", "chunked")
        ]
        torch.testing.assert_close(*outs)
        given = torch.randn(outs[0].shape, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(*(torch.autograd.grad(out, bias.tensors(), given) for out in outs))


def test_explain_tells_that_tiles_serve_a_long_input():
    q, k, v = random_qkv(2048, dtype=torch.float32)
    told = explain("laser+bigbird", (q, k, v), mask=Mask.causal())
    assert told.chosen == "chunked"
    assert "of which 64 rows together see about 512" in str(told)


def test_narrow_blocks_go_to_tiles_once_a_tile_sees_less_than_everything():
    """64 rows hold 16 blocks of 4, which draw 48 random blocks: 272 keys, more than 256 and less than 512."""
    for length, chosen in ((256, "sdpa"), (512, "chunked")):
        q, k, v = random_qkv(length, dtype=torch.float32)
        assert explain("bigbird:block_size=4", (q, k, v)).chosen == chosen


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bigbird:window_blocks=4", "odd"),
        ("bigbird:block_size=0", "at least 1"),
        ("bigbird:plan=relased", "did you mean 'released'"),
        ("bigbird:random=3", "no option 'random'"),
    ],
)
def test_wrong_options_are_refused(text, words):
    with pytest.raises(UserError, match=words):
        AttentionSpec.parse(text)
