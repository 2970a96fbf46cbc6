"""`init_` on our own models: every parameter once, the right variances, repeatable, and kept by save and load."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn as nn

import clearhead as ch
from clearhead.errors import UserError
from clearhead.init.deepscale import attention_share, value_output_std
from clearhead.init.plan import Piece, make_plan
from clearhead.init.report import check_once
from clearhead.init.start import start_rules
from clearhead.layers.residual import PlainSum, ScaledSum
from clearhead.models.choices import INITS
from clearhead.models.config import ModelConfig
from clearhead.models.make import build_model

torch.set_num_threads(1)

SMALL = {"vocab_size": 61, "context": 16, "layers": 3, "width": 32, "heads": 4, "dropout": 0.1}
SCHEMES = [(name, "post") for name in INITS] + [(name, "pre") for name in INITS if not name.startswith("admin")]


def batch_for(architecture, seed=0):
    tokens = torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(seed))
    return (tokens, tokens.flip(0)) if architecture == "seq2seq" else tokens


def run(model, batch):
    model.eval()
    with torch.no_grad():
        return model(*batch) if isinstance(batch, tuple) else model(batch)


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "seq2seq"])
@pytest.mark.parametrize(("scheme", "placement"), SCHEMES)
def test_every_scheme_on_every_architecture(tmp_path, architecture, scheme, placement):
    batch = batch_for(architecture)
    model = build_model(ModelConfig(architecture=architecture, norm_placement=placement, norm="layer", **SMALL))
    report = ch.init_(model, scheme, batch=batch, seed=3)
    names = [name for name, _ in model.named_parameters()]
    assert [entry.name for entry in report.entries] == names
    assert sum(entry.count for entry in report.entries) == sum(p.numel() for p in model.parameters())
    for entry in report.entries:
        if entry.variance_asked:
            assert entry.variance == pytest.approx(entry.variance_asked, rel=0.25), entry.name
        assert entry.mean == pytest.approx(entry.mean_asked, abs=0.02 + 0.2 * entry.variance_asked**0.5)
    assert json.loads(json.dumps(report.to_dict()))["scheme"] == scheme
    assert "embedding" in str(report)

    # Saved and loaded it is the same model, with its rules, and nothing is drawn or profiled again.
    expected = run(model, batch)
    ch.save_model(model, tmp_path)
    loaded = ch.load_model(tmp_path)
    assert loaded.config == model.config
    assert loaded.config.init == scheme
    assert torch.equal(run(loaded, batch), expected)
    assert loaded.state_dict().keys() == model.state_dict().keys()

    # The same seed again gives the same model; another seed another one.
    again = build_model(ModelConfig(architecture=architecture, norm_placement=placement, norm="layer", **SMALL), 9)
    torch.manual_seed(77)
    ch.init_(again, scheme, batch=batch, seed=3)
    assert torch.equal(run(again, batch), expected)
    ch.init_(again, scheme, batch=batch, seed=4)
    assert not torch.equal(run(again, batch), expected)


@pytest.mark.parametrize(("scheme", "placement"), [case for case in SCHEMES if case[0] != "admin"])
def test_a_model_built_with_a_scheme_is_the_one_that_init_makes(scheme, placement):
    built = build_model(ModelConfig(init=scheme, norm_placement=placement, **SMALL))
    made = build_model(ModelConfig(norm_placement=placement, **SMALL))
    ch.init_(made, scheme)
    assert made.config == built.config
    ours, theirs = made.state_dict(), built.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # And back: a plain scheme leaves no trace.
    ch.init_(made, "standard")
    plain = build_model(ModelConfig(norm_placement=placement, **SMALL)).state_dict()
    assert {n: t.shape for n, t in made.state_dict().items()} == {n: t.shape for n, t in plain.items()}
    assert all(torch.equal(made.state_dict()[name], plain[name]) for name in plain)
    assert all(type(module.rule) is PlainSum for module in made.modules() if hasattr(module, "rule"))


def test_parameters_shared_by_name_start_equal_across_models():
    one = build_model(ModelConfig(init="deepscale", **SMALL))
    two = build_model(ModelConfig(init="deepscale", **{**SMALL, "qk_norm": True, "output_gate": "head"}))
    theirs = dict(two.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in one.named_parameters())


def test_options_reach_the_config_and_the_rules():
    model = build_model(ModelConfig(**SMALL))
    report = ch.init_(model, "deepscale", k=1.5, alpha=0.5, depth_counts="blocks", embedding_correlation=0.3)
    assert model.config.deepscale_k == 1.5
    assert model.config.embedding_correlation == 0.3
    rule = model.blocks[1].attention_residual.rule
    assert float(rule.branch_scale) ** 2 == pytest.approx(1.5 / 6**0.5, rel=1e-6)
    assert report.residuals["blocks.0.attention"]["branch_scale"] == pytest.approx(float(rule.branch_scale))
    assert report.facts["embedding correlation"] == 0.3
    many = copy.deepcopy(model)
    ch.init_(many, "deepscale", keys="many", embedding_correlation=0.3)
    first = {"value": 0, "output": 0}
    for role in first:
        std = getattr(many.blocks[0].attention, role).weight.std().item()
        assert std == pytest.approx(((0.9 / 0.27) ** 0.5 / 32) ** 0.5, rel=0.1)


def test_the_correlation_of_a_batch_is_used_and_kept():
    model = build_model(ModelConfig(**SMALL))
    tokens = torch.tensor([[1, 1, 2, 3], [4, 4, 4, 4]])
    ch.init_(model, "deepscale", batch=tokens)
    assert model.config.embedding_correlation == pytest.approx((2 + 12) / 24)
    padded = {"tokens_bt": tokens, "valid": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()}
    ch.init_(model, "deepscale", batch=padded)
    assert model.config.embedding_correlation == 1.0


def test_the_tied_head_gives_logits_of_variance_1():
    config = ModelConfig(init="deepscale", **{**SMALL, "width": 128, "layers": 6})
    model = build_model(config).eval()
    assert run(model, batch_for("decoder")).var().item() == pytest.approx(1.0, rel=0.1)
    assert "head_scale.scale" in model.state_dict()
    untied = build_model(ModelConfig(**{**SMALL, "width": 128, "tie_embeddings": False}, init="deepscale"))
    assert run(untied, batch_for("decoder")).var().item() == pytest.approx(1.0, rel=0.1)
    assert "head_scale.scale" not in untied.state_dict()


def test_post_norm_gets_an_embedding_norm_only_where_the_scheme_asks():
    assert build_model(ModelConfig(init="deepscale", norm_placement="post", **SMALL)).config.norms_embedding
    assert not build_model(ModelConfig(init="deepscale", **SMALL)).config.norms_embedding
    assert not build_model(ModelConfig(init="xavier", norm_placement="post", **SMALL)).config.norms_embedding
    model = build_model(ModelConfig(init="deepscale", norm_placement="post", **SMALL)).train()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(batch_for("decoder"))
    assert seen[0].var().item() == pytest.approx(1.0, rel=0.05)  # with the dropout behind the norm


def test_sinusoidal_positions_weigh_like_the_tokens():
    model = build_model(ModelConfig(**{**SMALL, "position": "sinusoidal", "width": 64}))
    ch.init_(model, "deepscale")
    table = model.position(torch.arange(16)[None])
    assert table.square().mean().item() == pytest.approx(0.45, rel=1e-3)
    assert model.embedding.weight.square().mean().item() == pytest.approx(0.45, rel=0.1)
    ch.init_(model, "standard")
    assert model.position(torch.arange(16)[None]).square().mean().item() == pytest.approx(0.02**2, rel=1e-3)


def test_grouped_queries_keep_the_branch_at_variance_1():
    def branch_variance(kv_heads):
        settings = {**SMALL, "width": 256, "context": 128, "kv_heads": kv_heads, "layers": 4, "vocab_size": 200}
        model = build_model(ModelConfig(init="deepscale", **settings)).train()
        seen = []
        dropout = model.blocks[2].attention_residual.dropout
        dropout.register_forward_hook(lambda module, args, out: seen.append(out.var().item()))
        tokens = torch.multinomial(1.0 / torch.arange(1, 201), 4 * 128, replacement=True).view(4, 128)
        with torch.no_grad():
            model(tokens)
        return seen[0]

    for kv_heads in (4, 1):
        assert branch_variance(kv_heads) == pytest.approx(1.0, rel=0.3)


def test_cross_attention_uses_the_correlation_of_the_encoders_output():
    config = ModelConfig(architecture="seq2seq", init="deepscale", **SMALL)
    model = build_model(config)
    rules = start_rules(model, config)
    share = attention_share(rules.correlations["encoder"].output, config.context)[0]
    report = ch.init_(model, "deepscale")
    for layer in range(3):
        asked = report[f"decoder.blocks.{layer}.cross_attention.value.weight"].variance_asked
        assert asked == pytest.approx(value_output_std(32, share, 0.1) ** 2, rel=1e-9)
    own = [report[f"decoder.blocks.{layer}.attention.value.weight"].variance_asked for layer in range(3)]
    assert own[0] > own[1] > own[2]  # the decoder's own correlation grows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "admin"}, "it needs norm_placement=post"),
        ({"init": "admin_constant"}, "it needs norm_placement=post"),
        ({"init": "deepscale", "layers": 1}, "beta^2 = k / N^alpha = 2 / 1^1 = 2 exceeds 1"),
        ({"init": "deepscale", "deepscale_k": 0}, "deepscale_k: expected a number above 0"),
        ({"init": "deepscale", "deepscale_constants": "published"}, "no gated feed-forward"),
        ({"init": "deepscal"}, "did you mean 'deepscale'?"),
        ({"depth_counts": "layer"}, "did you mean 'layers'?"),
        ({"embedding_correlation": 1.5}, "embedding_correlation: expected a correlation in [0, 1], got 1.5"),
        ({"embedding_norm": 1}, "embedding_norm: expected true or false"),
        ({"output_change": "logn"}, "did you mean 'log'?"),
        ({"init": "deepscale", "architecture": "seq2seq", "decoder_layers": 1}, "exceeds 1"),
    ],
)
def test_bad_configs_are_refused_in_one_line(options, message):
    with pytest.raises(UserError) as caught:
        ModelConfig.from_dict(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("deepscalee", {}, "did you mean 'deepscale'?"),
        ("deepscale", {"kk": 2}, "unknown option of init deepscale 'kk'"),
        ("deepscale", {"omega": "profiled"}, "unknown option of init deepscale 'omega'"),
        ("admin", {}, "give batch= (token ids"),
        ("admin", {"batch": torch.zeros(2, 4, dtype=torch.long)}, "it needs norm_placement=post"),
    ],
)
def test_bad_calls_change_nothing(scheme, options, message):
    model = build_model(ModelConfig(**SMALL))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        ch.init_(model, scheme, **options)
    assert message in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_plan_that_misses_or_doubles_a_parameter_is_an_error():
    from clearhead.anatomy.find import anatomy_of

    model = build_model(ModelConfig(init="deepscale", **SMALL))
    pieces = make_plan(anatomy_of(model), start_rules(model, model.config))
    parameters = dict(model.named_parameters())
    check_once(parameters, pieces)
    with pytest.raises(RuntimeError, match=r"misses norm\.weight"):
        check_once(parameters, [piece for piece in pieces if piece.parameter != "norm.weight"])
    with pytest.raises(RuntimeError, match=r"more than once embedding\.weight"):
        check_once(parameters, [pieces[0], *pieces])
    with pytest.raises(RuntimeError, match="which the model does not have"):
        check_once(parameters, [Piece("nobody.weight", "", pieces[0].draw, ""), *pieces])


@pytest.mark.parametrize("feed_forward", ["swiglu", "gelu", "relu"])
def test_the_meta_device_is_left_alone(feed_forward):
    with torch.device("meta"):
        model = build_model(ModelConfig(**{"init": "deepscale", **SMALL, "feed_forward": feed_forward}))
        admin = build_model(ModelConfig(init="admin", norm_placement="post", admin_omega="predicted", **SMALL))
    assert all(p.is_meta for m in (model, admin) for p in m.parameters())


@pytest.mark.parametrize("init", ["standard", "deepscale", "admin"])
def test_fsdp2_parameters_are_drawn_alike(init):
    """One process over gloo: sharded parameters get the whole model's values; rules that need new ones are refused."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    config = ModelConfig(init=init, norm_placement="post", **SMALL)
    whole, sharded = build_model(config), build_model(config, 5)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in sharded.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        sharded.init_parameters(0)
        for name, p in sharded.named_parameters():
            assert torch.equal(p.full_tensor(), whole.get_parameter(name)), name
        if init != "admin":
            report = ch.init_(sharded, init, seed=0)
            assert report["embedding.weight"].variance == pytest.approx(
                report["embedding.weight"].variance_asked, rel=0.2
            )
            with pytest.raises(UserError, match="call init_ before fully_shard"):
                ch.init_(sharded, "admin", batch=batch_for("decoder"))
        else:
            with pytest.raises(UserError, match="profile before fully_shard"):
                ch.init_(sharded, "admin", batch=batch_for("decoder"))
    finally:
        dist.destroy_process_group()


def test_half_precision_survives_save_and_load(tmp_path):
    model = build_model(ModelConfig(init="deepscale", **SMALL)).to(torch.bfloat16)
    ch.save_model(model, tmp_path)
    loaded = ch.load_model(tmp_path)
    assert loaded.embedding.weight.dtype == torch.bfloat16
    rule = loaded.blocks[0].attention_residual.rule
    assert isinstance(rule, ScaledSum)
    assert rule.stream_scale.dtype == torch.float32
    assert torch.equal(run(loaded, batch_for("decoder")), run(model, batch_for("decoder")))


def test_other_layers_are_refused_by_name():
    model = build_model(ModelConfig(init="deepscale", **SMALL))
    model.extra = nn.Conv1d(2, 2, 1)
    report = ch.init_(model, "deepscale")
    assert report["extra.weight"].draw == "kept"  # and said to be
