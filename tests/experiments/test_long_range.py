"""What the BigBird and Performer experiments compute before anything is trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from experiments.bigbird import graph, needle
from experiments.performer import conversion, error

from clearhead.models.config import ModelConfig
from clearhead.models.make import build_model


@pytest.mark.parametrize("pattern", list(needle.PATTERNS))
def test_the_best_that_the_graph_allows_is_what_a_model_can_read(pattern):
    """The reader's output has a gradient at exactly the tokens that the ceiling counts as reached."""
    job = needle.Job(pattern, seed=3, steps=0)
    model = build_model(
        ModelConfig(
            architecture="encoder", vocab_size=needle.VOCABULARY, context=needle.TOKENS, layers=needle.LAYERS, width=16,
            heads=needle.HEADS, attention=job.attention, position="none", init="xavier",
        ),
        seed=0,
    ).double()  # fmt: skip
    tokens_bt, _ = needle.draw(1, torch.Generator().manual_seed(0))
    caught = []
    hook = model.embedding.register_forward_hook(lambda module, given, out: caught.append(out.requires_grad_()))
    model.hidden(tokens_bt)[:, needle.READER_AT].square().sum().backward(inputs=caught)
    hook.remove()
    read = (caught[0].grad[0].abs().sum(-1) > 0).numpy()
    allowed = needle.allowed().numpy()
    share = float(read[allowed].mean())
    assert graph.ceiling(job) == pytest.approx(share + (1 - share) / needle.CLASSES)


def test_the_needle_stands_where_the_reader_does_not_look_and_nothing_else_tells():
    tokens_bt, class_b = needle.draw(500, torch.Generator().manual_seed(0))
    assert (tokens_bt[:, needle.READER_AT] == needle.READER).all()
    is_needle = tokens_bt < needle.CLASSES
    assert (is_needle.sum(1) == 1).all()
    at_b = is_needle.int().argmax(1)
    assert torch.equal(tokens_bt.gather(1, at_b[:, None])[:, 0], class_b)
    block_b = at_b // needle.BLOCK
    assert ((block_b > 0) & (block_b < needle.BLOCKS - 1)).all()
    assert ((at_b - needle.READER_AT).abs() >= needle.TOKENS // 4).all()
    assert class_b.bincount(minlength=needle.CLASSES).min() > 30


def test_walks_are_short_with_globals_longer_with_random_blocks_and_longest_in_a_window():
    """Two steps; about log N; N / 2 rows of a window that reaches one block to each side: N - 1 steps end to end."""
    found = {(row["pattern"], row["blocks"]): row["diameters"] for row in graph.diameters((16, 64, 256), range(2))}
    for size in (16, 64, 256):
        assert set(found["window + global + random", size]) == set(found["window + global", size]) == {2}
        assert found["window", size] == [size - 1]
        assert max(found["window + random", size]) <= np.log2(size)


def test_a_slope_of_a_power_law_is_its_power():
    points = [{"features": m, "rmse": 3.0 * m**-0.5} for m in error.FEATURES]
    assert error.slope(points) == pytest.approx(-0.5)


def test_kernel_entries_with_many_rows_come_near_the_exponential():
    q, k, _ = error.inputs(0.5)
    x, y = (t[0, 0, :8] * error.DIM**-0.25 for t in (q, k))
    for law in error.LAWS:
        found = error._kernel(error.LAWS[law][0], error.rows(law, 1 << 15, 0), x, y)
        torch.testing.assert_close(found, (x @ y.mT).exp(), rtol=0.1, atol=0.0)


def test_scores_under_other_rows_leave_the_model_as_it_was():
    model = build_model(
        ModelConfig(vocab_size=257, context=conversion.CONTEXT, layers=1, width=16, heads=1, attention="performer"), 0
    )
    before = {name: t.clone() for name, t in model.state_dict().items()}
    own = conversion.score(model)["nats"]
    assert conversion.other_draws(model, draws=1) != own
    assert conversion.score(model)["nats"] == own
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
