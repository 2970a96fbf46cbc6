"""Admin: the profile pass, the closed form, and folding omega away exactly."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import clearhead as ch
from clearhead.anatomy.find import anatomy_of
from clearhead.errors import UserError
from clearhead.init.admin import needs_profile, omega_rules, predicted_omega, profile_omega
from clearhead.init.fold import fold_omega
from clearhead.layers.residual import ConstantOmegaSum, OmegaSum, PlainSum
from clearhead.models.config import ModelConfig
from clearhead.models.make import build_model

torch.set_num_threads(1)

POST = {"norm_placement": "post", "norm": "layer", "init": "admin"}
SMALL = {"vocab_size": 61, "context": 32, "layers": 3, "width": 32, "heads": 4, "dropout": 0.1, "feed_forward": "relu"}


def tokens(rows=4, length=32, vocabulary=61, seed=0):
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def make(**options):
    return build_model(ModelConfig(**{**SMALL, **POST, **options}))


def branch_variances(model, batch, seed=0):
    """Var f of every branch after its dropout, and of every stream, of one train-mode pass."""
    found = []
    hooks = [
        rule.register_forward_pre_hook(lambda module, args: found.append([float(x.var(correction=0)) for x in args]))
        for rules in omega_rules(model).values()
        for rule in rules
    ]
    torch.manual_seed(seed)
    with torch.no_grad():
        model.train()(batch)
    for hook in hooks:
        hook.remove()
    return found


def test_omega_squared_grows_by_the_variance_of_each_branch():
    model = make(layers=6, width=64)
    batch = tokens(8)
    found = profile_omega(model, batch, seed=3)["decoder"]
    assert found[0] == 1.0
    assert all(later >= earlier for earlier, later in itertools.pairwise(found))
    # The very pass again, now with omega in place: the same masks, so the same branches.
    seen = branch_variances(model, batch, seed=3)
    for i, (stream, branch) in enumerate(seen[:-1]):
        assert found[i + 1] ** 2 == pytest.approx(found[i] ** 2 * stream + branch, rel=1e-5)
        if i:  # behind a norm the stream has variance 1
            assert found[i + 1] ** 2 - found[i] ** 2 == pytest.approx(branch, rel=0.03)
    # Each branch's share of its sum falls like 1/i, so the sum of shares is O(log n).
    shares = [branch / (omega**2 + branch) for omega, (_, branch) in zip(found, seen)]
    assert sum(shares) < 2.5


def test_a_small_case_under_full_attention():
    """N = 6, d = 64, fused Xavier: omega is about 1.0, 1.011, 1.161, 1.191, 1.321, 1.351 ..."""
    model = make(architecture="encoder", layers=6, width=64, vocab_size=4000, dropout=0.0)
    found = profile_omega(model, tokens(16, 32, 4000))["encoder"]
    # The feed-forward half is independent of the data: d hidden (2 / (d + hidden))^2 / 2 = 0.32.
    steps = [b**2 - a**2 for a, b in itertools.pairwise(found)]
    assert steps[1::2] == pytest.approx([0.32] * 5, rel=0.08)
    assert steps[0] == pytest.approx(0.02, abs=0.02)
    assert found[5] == pytest.approx(1.351, abs=0.05)


def test_the_feed_forwards_half_needs_no_profile():
    """Xavier 2/(512 + 2048), dropout 0.1 on branch and hidden: 0.39506 (the shipped profile's mean is 0.39516)."""
    variance = 512 * 2048 * (2 / 2560) ** 2 / 2 / (0.9 * 0.9)
    assert variance == pytest.approx(0.39506, abs=5e-6)
    model = make(width=128, layers=2, hidden=512)
    anatomy = anatomy_of(model)
    for sub in (anatomy.stacks[0].blocks[0].sublayers[1], anatomy.stacks[0].blocks[1].sublayers[1]):
        torch.nn.init.xavier_uniform_(sub.branch.up.module.weight)
        torch.nn.init.xavier_uniform_(sub.branch.down.module.weight)
    found = predicted_omega(anatomy, {"decoder": 0.05}, 32)["decoder"]
    expected = 128 * 512 * (2 / 640) ** 2 / 2 / 0.9
    assert found[2] ** 2 - found[1] ** 2 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "seq2seq"])
def test_the_closed_form_is_near_the_profile(architecture):
    model = make(layers=6, width=128, architecture=architecture, vocab_size=200, context=64)
    text = torch.multinomial(1.0 / torch.arange(1, 201), 8 * 64, replacement=True).view(8, 64)
    batch = (text, text.flip(1)) if architecture == "seq2seq" else text
    measured = profile_omega(model, batch)
    r0 = sum(float(p) for p in ((1 / torch.arange(1, 201)) / (1 / torch.arange(1, 201)).sum()).square())
    predicted = predicted_omega(anatomy_of(model), dict.fromkeys(measured, r0), 64)
    for stack in measured:
        assert predicted[stack] == pytest.approx(measured[stack], rel=0.05)
    by_config = build_model(ModelConfig(**{**SMALL, **POST, "architecture": architecture}, admin_omega="predicted"))
    assert not needs_profile(by_config)
    assert all(float(rules[-1].omega.detach()[0]) > 1.1 for rules in omega_rules(by_config).values())


def test_encoder_and_decoder_have_accumulators_of_their_own():
    model = make(architecture="seq2seq", decoder_layers=2)
    found = profile_omega(model, (tokens(), tokens(seed=1)))
    assert [len(found["encoder"]), len(found["decoder"])] == [6, 6]
    assert found["encoder"][0] == found["decoder"][0] == 1.0


def test_the_pass_leaves_everything_else_as_it_was():
    model = make()
    model.train()
    model.blocks[1].eval()
    model.blocks[1].attention.query.weight.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items() if "rule" not in name}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert torch.is_grad_enabled()
    profile_omega(model, tokens())
    assert torch.equal(torch.rand(3), expected)
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if name in before)
    assert not model._forward_pre_hooks
    assert not any(rule._forward_pre_hooks for rules in omega_rules(model).values() for rule in rules)


def test_profiled_is_a_flag_and_not_a_value():
    model = make()
    assert needs_profile(model)
    profile_omega(model, tokens())
    assert not needs_profile(model)
    with torch.no_grad():
        for rule in omega_rules(model)["decoder"]:
            rule.omega.fill_(1.0)
    assert not needs_profile(model)  # all ones, and yet profiled
    fresh = make()
    fresh.load_state_dict(model.state_dict())
    assert not needs_profile(fresh)
    model.init_parameters(1)
    assert needs_profile(model)


def test_padding_is_left_out_unless_asked_for():
    model = make(dropout=0.0)
    real = tokens(4, 16)
    garbage = torch.full((4, 16), 60)
    padded = {"tokens_bt": torch.cat((real, garbage), 1), "valid": (torch.arange(32) < 16).expand(4, 32)}
    alone = profile_omega(model, real)["decoder"]
    assert profile_omega(model, padded)["decoder"] == pytest.approx(alone, rel=1e-5)
    assert profile_omega(model, padded, include_padding=True)["decoder"] != pytest.approx(alone, rel=1e-3)


def test_profiling_needs_a_model_with_omega():
    with pytest.raises(UserError, match="no omega to profile"):
        profile_omega(build_model(ModelConfig(**SMALL)), tokens())


FOLDS = {
    "embedding norm": {},
    "tied": {"embedding_norm": False},
    "untied": {"embedding_norm": False, "tie_embeddings": False, "position": "learned"},
    "rms, swiglu": {"norm": "rms", "feed_forward": "swiglu", "embedding_norm": False},
    "grouped, gated": {"kv_heads": 2, "output_gate": "element", "qk_norm": True},
    "selective": {"attention": "laser+selective", "feed_forward": "gelu"},
    "sinusoidal": {"position": "sinusoidal"},
    "constant vector": {"init": "admin_constant", "omega_form": "vector"},
    "constant": {"init": "admin_constant", "embedding_norm": False},
    "encoder": {"architecture": "encoder", "segment_types": 2, "position": "t5"},
    "seq2seq": {"architecture": "seq2seq"},
    "seq2seq, own tables": {"architecture": "seq2seq", "share_embeddings": False, "embedding_norm": False},
}


@pytest.mark.parametrize("case", FOLDS)
def test_folding_is_exact(case, tmp_path):
    """Random omega, gamma, nu and weights in float64: the plain model answers the same to 1e-12."""
    model = make(**FOLDS[case]).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for module in model.modules():
            if isinstance(module, OmegaSum):
                module.omega.copy_(0.5 + 2.0 * torch.rand(module.omega.shape, generator=generator))
                module.omega[0] *= -1.0
    batch = (tokens(), tokens(seed=1)) if "seq2seq" in case else (tokens(),)
    model.eval()
    with torch.no_grad():
        expected = model(*batch)
        fold_omega(model)
        found = model(*batch)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-12
    assert not any(isinstance(module, OmegaSum | ConstantOmegaSum) for module in model.modules())
    assert isinstance(
        next(module for name, module in model.named_modules() if name.endswith("_residual.rule")), PlainSum
    )
    assert not any("omega" in name or "profiled" in name for name in model.state_dict())
    assert model.config.init == "xavier"
    ch.save_model(model, tmp_path)
    loaded = ch.load_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(*batch), found)


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(UserError, match="expected a clearhead model with init=admin"):
        fold_omega(build_model(ModelConfig(**SMALL)))
    model = make(position="sinusoidal", embedding_norm=False)
    fold_omega(model)  # omega_1 is exactly 1
    model = make(position="sinusoidal", embedding_norm=False)
    with torch.no_grad():
        omega_rules(model)["decoder"][0].omega.fill_(1.5)
    with pytest.raises(UserError, match="embedding_norm=true"):
        fold_omega(model)
    model = make()
    with torch.no_grad():
        omega_rules(model)["decoder"][2].omega[3] = 0.0
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(UserError, match="an omega is 0"):
        fold_omega(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    model = make(architecture="seq2seq", embedding_norm=False)
    with torch.no_grad():
        omega_rules(model)["decoder"][0].omega.fill_(1.5)
    with pytest.raises(UserError, match="share_embeddings=false"):
        fold_omega(model)


@pytest.mark.parametrize("depth", [6, pytest.param(100, marks=pytest.mark.full)])
def test_admin_answers_a_change_of_the_weights_as_pre_norm_does(depth):
    """Noise on the matrices moves plain Post-LN's output much more than profiled Admin's."""

    def change(**options):
        config = {**SMALL, "layers": depth, "width": 64, "dropout": 0.0, **options}
        model = build_model(ModelConfig(**config)).eval()
        if options.get("init") == "admin":
            profile_omega(model, tokens())
        with torch.no_grad():
            head = []
            model.head.register_forward_pre_hook(lambda module, args: head.append(args[0]))
            model(tokens())
            generator = torch.Generator().manual_seed(2)
            for name, p in model.named_parameters():
                if p.dim() > 1 and "embedding" not in name:
                    p.add_(0.01 * torch.randn(p.shape, generator=generator))
            model(tokens())
        return float((head[1] - head[0]).square().mean())

    admin = change(norm_placement="post", norm="layer", init="admin")
    plain = change(norm_placement="post", norm="layer", init="admin_constant", output_change="linear")
    assert math.isfinite(admin)
    assert plain > (1.3 if depth == 6 else 2.0) * admin  # measured at 100 layers: 2.8
