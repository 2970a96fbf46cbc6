"""Vectors of segments, and where each term's gradient goes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from clearhead.errors import UserError
from clearhead.models.config import ModelConfig
from clearhead.models.make import build_model
from clearhead.objectives.bmi.cost import extra_cost
from clearhead.objectives.bmi.critic import Critic
from clearhead.objectives.bmi.information import FrozenPairs, estimate_information, freeze, halves
from clearhead.objectives.bmi.segments import cut_documents
from clearhead.objectives.bmi.states import layer_states, pool, segment_vectors
from clearhead.objectives.bmi.terms import bmi_terms
from clearhead.objectives.config import ObjectiveConfig, pooled_layers


def model_of(architecture="decoder", **changes):
    config = ModelConfig(
        **{"architecture": architecture, "vocab_size": 13, "layers": 3, "width": 16, "heads": 2, "context": 32}
        | changes
    )
    return build_model(config, 2).double().eval()


TOKENS = torch.randint(0, 13, (3, 7), generator=torch.Generator().manual_seed(1))
VALID = torch.arange(7) < torch.tensor([7, 3, 1])[:, None]


# ---- states and pooling ----


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
def test_states_are_those_of_each_block_and_the_last_norm(architecture, placement):
    model = model_of(architecture, norm_placement=placement)
    seen = []
    handles = [block.register_forward_hook(lambda m, a, out: seen.append(out)) for block in model.blocks]
    logits = model(TOKENS, valid=VALID)
    for handle in handles:
        handle.remove()
    states = layer_states(model, TOKENS, VALID)
    assert len(states) == 3
    assert all(torch.equal(state, block) for state, block in zip(states[:-1], seen[:-1]))
    assert torch.equal(model.logits(states[-1])[VALID], logits[VALID])
    assert not any(module._forward_hooks for module in model.modules())  # nothing is left behind


def test_an_encoder_decoder_shows_its_encoder():
    model = model_of("seq2seq")
    assert torch.equal(layer_states(model, TOKENS, VALID)[-1], model.encode(TOKENS, valid=VALID))


def test_a_model_without_layers_is_refused():
    with pytest.raises(UserError, match="no blocks and norm"):
        layer_states(torch.nn.Linear(3, 3), TOKENS)


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "seq2seq"])
@pytest.mark.parametrize("position", ["rope", "learned", "alibi"])
def test_padding_is_no_time(architecture, position):
    model = model_of(architecture, position=position)
    together = segment_vectors(model, TOKENS, VALID, layers=(1, 2, 3))
    for row, length in enumerate((7, 3, 1)):
        alone = segment_vectors(model, TOKENS[row : row + 1, :length], layers=(1, 2, 3))
        assert torch.allclose(together[row], alone[0], atol=1e-12)
    edited = TOKENS.masked_fill(~VALID, 5)
    assert torch.equal(together, segment_vectors(model, edited, VALID, layers=(1, 2, 3)))


def test_pooling_takes_the_largest_real_value_even_where_all_are_negative():
    state = torch.tensor([[[-3.0, 1.0], [-2.0, -1.0], [9.0, 9.0]]])
    assert pool([state], torch.tensor([[True, True, False]])).tolist() == [[-2.0, 1.0]]
    assert pool([state, -state]).shape == (1, 4)
    poisoned = state.masked_fill(torch.tensor([[[False], [False], [True]]]), float("nan")).requires_grad_()
    pooled = pool([poisoned], torch.tensor([[True, True, False]]))
    pooled.sum().backward()
    assert pooled.isfinite().all()
    assert poisoned.grad.isfinite().all()
    with pytest.raises(ValueError, match="without a real token"):
        pool([state], torch.zeros(1, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("text", "chosen"), [("all", (1, 2, 3)), ("last", (3,)), ("last:2", (2, 3)), ("3,1", (1, 3)), ("2", (2,))]
)
def test_layers_are_named(text, chosen):
    assert pooled_layers(text, 3) == chosen


@pytest.mark.parametrize("text", ["last:4", "0", "4", "first", "last:0", "1,x", ""])
def test_layers_that_are_not_there_are_refused(text):
    with pytest.raises(UserError, match="objective.pooled"):
        pooled_layers(text, 3)


# ---- gradients ----


def pairs_of(count=5):
    random = np.random.default_rng(0)
    documents = [random.integers(0, 13, size=n) for n in (47, 33, 20)]
    return cut_documents(documents, "chunk:6").draw(count, lookahead=0.3, seed=0, step=0)


def reached(objective, model):
    critic = Critic(48, hidden=8, dropout=0.0).double()
    terms = bmi_terms(model, critic, pairs_of(), objective, layers=(1, 2, 3))
    if terms.added.requires_grad:
        terms.added.backward()
    has = lambda module: any(p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters())
    return has(model), has(critic), terms


@pytest.mark.parametrize(
    ("changes", "model", "critic"),
    [
        ({"nsp": 0.5}, True, True),
        ({"nsp": 0.5, "nsp_trains": "critic"}, False, True),
        ({"nsp": 0.5, "raml": 0.5, "start": "x"}, True, True),
        ({"nsp": 0.5, "nsp_trains": "critic", "raml": 0.5, "start": "x"}, True, True),
        ({"raml": 0.5, "start": "x"}, True, False),
    ],
)
def test_gradients_go_where_the_table_says(changes, model, critic):
    found_model, found_critic, _ = reached(ObjectiveConfig(**changes), model_of())
    assert (found_model, found_critic) == (model, critic)


def test_the_likelihood_teaches_the_critic_nothing():
    """The critic's gradient with it is the one without it, and the model's is the sum of the two terms' own."""

    def gradients(**changes):
        model, critic = model_of(), Critic(48, hidden=8, dropout=0.0, seed=4).double()
        bmi_terms(model, critic, pairs_of(), ObjectiveConfig(**changes), layers=(1, 2, 3)).added.backward()
        flat = lambda module: torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in module.parameters()]
        )
        return flat(model), flat(critic)

    both = gradients(nsp=0.5, raml=0.25, start="x")
    nsp = gradients(nsp=0.5)
    raml = gradients(raml=0.25, start="x")
    assert torch.equal(both[1], nsp[1])
    assert raml[1].abs().max() == 0
    assert torch.allclose(both[0], nsp[0] + raml[0], atol=1e-7)  # nats are summed in fp32


def test_terms_are_their_formulas():
    model, critic = model_of(), Critic(16, hidden=8, dropout=0.0, seed=4).double()
    objective = ObjectiveConfig(nsp=0.5, raml=0.25, start="x", temperature=2.0)
    pairs = pairs_of()
    terms = bmi_terms(model, critic, pairs, objective, layers=(3,))
    read = lambda part: segment_vectors(model, torch.from_numpy(part.tokens), torch.from_numpy(part.valid), layers=(3,))
    x, y, z, later = map(read, (pairs.first, pairs.next, pairs.other, pairs.later))
    sure = lambda s: s.sigmoid().log()
    nsp = -(sure(critic(x, y)).mean() + sure(-critic(x, z)).mean())
    assert terms.nsp.item() == pytest.approx(nsp.item(), rel=1e-6)
    w = ((critic(x, later) - critic(x, y)) / 2.0).exp() / torch.from_numpy(pairs.log_q).exp()
    w = w / w.sum()
    total = 0.0
    for row in range(5):
        a = torch.from_numpy(pairs.first.tokens[row, : pairs.first.lengths[row]])
        b = torch.from_numpy(pairs.later.tokens[row, : pairs.later.lengths[row]])
        log_p = model(torch.cat([a, b])[None]).log_softmax(-1)[0, len(a) - 1 : -1]
        total += w[row] * -log_p[torch.arange(len(b)), b].mean()
    assert terms.raml.item() == pytest.approx(total.item(), rel=1e-5)
    assert terms.effective.item() == pytest.approx(1 / (w * w).sum().item(), rel=1e-6)
    assert terms.added.item() == pytest.approx(0.5 * nsp.item() + 0.25 * total.item(), rel=1e-5)
    assert terms.measured().keys() == {"nsp", "nsp_accuracy", "raml", "effective_pairs"}


def test_an_encoder_takes_next_segments_alone():
    model = model_of("encoder")
    assert reached(ObjectiveConfig(nsp=1.0), model)[:2] == (True, True)
    with pytest.raises(UserError, match="no probability"):
        reached(ObjectiveConfig(nsp=1.0, raml=1.0, start="x"), model)


# ---- information from frozen states ----


def made_pairs(information, count=1200, size=4):
    """Vectors of correlated Gaussians as if they were states of 12 documents."""
    rho = (1 - np.exp(-2 * information / size)) ** 0.5
    generator = torch.Generator().manual_seed(3)
    x, noise = torch.randn(2, count, size, generator=generator)
    number = 3 * np.arange(count)
    return FrozenPairs(x, rho * x + (1 - rho * rho) ** 0.5 * noise, number, np.arange(count) // (count // 12))


def test_a_fresh_critic_finds_what_is_there_and_nothing_where_nothing_is():
    found = estimate_information(made_pairs(0.9), choices=16)
    assert found.split_by == "documents"
    assert found.pairs + found.learned_from == 1200
    assert 0.4 < found.nwj <= 1.15  # few pairs to learn from: lower, and never far above
    assert 0.4 < found.info_nce < 1.15
    assert found.accuracy > 0.65
    none = estimate_information(made_pairs(0.0), choices=16)
    assert abs(none.info_nce) < 0.05
    assert abs(none.nwj) < 0.05
    assert abs(none.accuracy - 0.5) < 0.05 or none.mean_score == 0.0
    assert estimate_information(made_pairs(0.9), choices=16) == found  # a function of pairs and seed


def test_halves_share_no_segment():
    random = np.random.default_rng(0)
    model = model_of()
    for sizes, by in (((120, 90, 80, 60), "documents"), ((300, 12), "position")):
        segments = cut_documents([random.integers(0, 13, size=n) for n in sizes], "chunk:3")
        pairs = freeze(model, segments, layers=(3,))
        learning, scored, split_by = halves(pairs)
        assert split_by == by
        sides = [{i for n in pairs.number[side] for i in (n, n + 1)} for side in (learning, scored)]
        assert not sides[0] & sides[1]
        assert min(map(len, sides)) * 3 > len(pairs) * 0.9


def test_freezing_reads_the_segments_and_leaves_the_model_alone():
    model = model_of().train()
    segments = cut_documents([np.arange(60) % 13, np.arange(40) % 11], "chunk:6")
    pairs = freeze(model, segments, layers=(1, 3), batch_size=4)
    assert model.training
    assert not pairs.first.requires_grad
    assert len(pairs) == len(segments.leading)
    row = segments.read(pairs.number[4:5] + 1)
    alone = segment_vectors(model.eval(), torch.from_numpy(row.tokens), layers=(1, 3))
    assert torch.allclose(pairs.next[4], alone[0].float(), atol=1e-5)
    assert len(freeze(model, segments, layers=(3,), most=5)) == 5


def test_too_few_pairs_are_refused():
    with pytest.raises(UserError, match="at least 16 pairs"):
        estimate_information(made_pairs(0.5, count=24))


# ---- cost ----


def test_operations_are_those_that_torch_counts():
    """torch counts matrix products and attention of forward and backward; ours counts visible keys, torch all of
    them, so a window of no width takes attention out."""
    from torch.utils.flop_counter import FlopCounterMode

    model = model_of(layers=2, tie_embeddings=False).float()
    critic = Critic(32, hidden=8, dropout=0.0)
    documents = [np.arange(48) % 13, np.arange(36) % 11]
    pairs = cut_documents(documents, "chunk:6").draw(4, lookahead=0.3, seed=0, step=0)
    for changes in (
        {"nsp": 1.0},
        {"nsp": 1.0, "nsp_trains": "critic"},
        {"nsp": 1.0, "raml": 1.0, "start": "x"},
        {"raml": 1.0, "start": "x"},
    ):
        objective = ObjectiveConfig(pairs=4, segments="chunk:6", **changes)
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            bmi_terms(model, critic, pairs, objective, layers=(1, 2)).added.backward()
        ours = extra_cost(model, critic, objective)
        assert ours.flops == pytest.approx(counter.get_total_flops(), rel=0.12)
        assert ours.tokens == 4 * (18 + (6 + 11 if objective.raml else 0))


def test_a_plain_objective_costs_nothing():
    cost = extra_cost(model_of(), Critic(16), ObjectiveConfig())
    assert (cost.tokens, cost.flops) == (0, 0.0)
    assert dataclasses.asdict(cost)
