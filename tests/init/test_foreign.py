"""`init_` on Hugging Face models: the rewritten sums are exact, and rules can be taken off or folded in."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import clearhead as ch
from clearhead.anatomy.find import anatomy_of
from clearhead.errors import UserError
from clearhead.init.deepscale import residual_constants
from clearhead.init.fold import fold_rules
from clearhead.init.foreign import RULE, BranchRule, StreamRule, _scale_output, remove_rules, rules_of

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

LAYERS = 6
SIZES = {"vocab_size": 61, "num_attention_heads": 4}


def gpt2(**options):
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=32, n_embd=32, n_layer=LAYERS, n_head=4, bos_token_id=0, eos_token_id=0, **options
    )
    return transformers.GPT2LMHeadModel(config)


def llama(**options):
    config = transformers.LlamaConfig(
        **SIZES, hidden_size=32, intermediate_size=88, num_hidden_layers=LAYERS, num_key_value_heads=2,
        tie_word_embeddings=False, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert(**options):
    config = transformers.BertConfig(
        **SIZES, hidden_size=32, intermediate_size=128, num_hidden_layers=LAYERS, max_position_embeddings=32, **options
    )
    return transformers.BertForMaskedLM(config)


def t5(**options):
    config = transformers.T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=64, num_layers=LAYERS, num_heads=4, decoder_start_token_id=0, **options
    )
    return transformers.T5ForConditionalGeneration(config)


MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert, "t5": t5}


def batch_for(name, seed=0):
    ids = torch.randint(1, 61, (3, 16), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "decoder_input_ids": ids.flip(0)} if name == "t5" else {"input_ids": ids}


def logits(model, name):
    model.eval()
    with torch.no_grad():
        return model(**batch_for(name)).logits


def without_eps(model):
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if hasattr(module, name):
                setattr(module, name, 1e-30)


@pytest.mark.parametrize("scheme", ["standard", "xavier", "deepscale", "deepscale_simple"])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_once_and_repeatable(name, scheme):
    model = MODELS[name]()
    report = ch.init_(model, scheme, batch=batch_for(name), seed=2)
    counted = {}
    for entry in report.entries:
        counted[entry.parameter] = counted.get(entry.parameter, 0) + entry.count
        if entry.variance_asked and entry.count > 200:
            assert entry.variance == pytest.approx(entry.variance_asked, rel=0.3), entry.name
    assert counted == {key: p.numel() for key, p in model.named_parameters()}
    expected = logits(model, name)
    torch.manual_seed(1)
    other = MODELS[name]()
    ch.init_(other, "standard", seed=7)
    ch.init_(other, scheme, batch=batch_for(name), seed=2)
    assert torch.equal(logits(other, name), expected)
    assert not torch.equal(logits_with_seed(other, name, scheme), expected)


def logits_with_seed(model, name, scheme):
    ch.init_(model, scheme, batch=batch_for(name), seed=3)
    return logits(model, name)


def test_fused_and_transposed_matrices_are_drawn_part_by_part():
    model = gpt2()
    report = ch.init_(model, "deepscale", embedding_correlation=0.05)
    name = "transformer.h.0.attn.c_attn.weight"
    value, query = report[f"{name}[value]"], report[f"{name}[query]"]
    assert query.variance_asked == pytest.approx(1 / 32)
    share = 0.05 * 0.9
    assert value.variance_asked == pytest.approx((0.9 / share) ** 0.5 / 32, rel=1e-6)
    weight = model.get_parameter(name)  # stored [in, out]
    assert weight[:, 64:].var().item() == pytest.approx(value.variance, rel=1e-2)
    assert weight[:, :32].var().item() == pytest.approx(query.variance, rel=1e-2)


def test_t5_scores_have_no_scale_so_the_query_takes_it():
    model = t5()
    report = ch.init_(model, "deepscale", batch=batch_for("t5"))
    q = report["encoder.block.0.layer.0.SelfAttention.q.weight"]
    assert q.variance_asked == pytest.approx(1 / (8 * 32))
    bias = report["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    assert (bias.draw, bias.variance) == ("0", 0.0)


def test_a_pre_norm_stream_is_exactly_the_scaled_sum():
    """GPT-2 written out by hand with x <- lambda x + beta f(norm(x)), in float64 and without eps."""
    model = gpt2().double().eval()
    without_eps(model)
    report = ch.init_(model, "deepscale", embedding_correlation=0.1)
    found = logits(model, "gpt2")
    plain = copy.deepcopy(model)
    remove_rules(plain)
    c = residual_constants(LAYERS)
    with torch.no_grad():
        body, ids = plain.transformer, batch_for("gpt2")["input_ids"]
        x = body.wte(ids) + body.wpe(torch.arange(16))
        for block in body.h:
            x = c.stream_scale * x + c.branch_scale * block.attn(block.ln_1(x))[0]
            x = c.stream_scale * x + c.branch_scale * block.mlp(block.ln_2(x))
        expected = plain.lm_head(body.ln_f(x) * report.facts["head scale"])
    # The constants are fp32 numbers: 1e-6, not float64's last digit.
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6
    assert float((logits(plain, "gpt2") - expected).abs().max() / expected.abs().max()) > 0.1


def test_a_post_norm_sum_is_exactly_the_scaled_one():
    model = bert().double().eval()
    without_eps(model)
    ch.init_(model, "deepscale", embedding_correlation=0.3)
    ids = batch_for("bert")["input_ids"]
    with torch.no_grad():
        found = model.bert(ids).last_hidden_state
    plain = copy.deepcopy(model)
    remove_rules(plain)
    c = residual_constants(LAYERS)
    with torch.no_grad():
        x = plain.bert.embeddings(ids)
        for layer in plain.bert.encoder.layer:
            f = layer.attention.output.dense(layer.attention.self(x)[0])
            x = layer.attention.output.LayerNorm(c.stream_scale * x + c.branch_scale * f)
            f = layer.output.dense(layer.intermediate(x))
            x = layer.output.LayerNorm(c.stream_scale * x + c.branch_scale * f)
    assert float((found - x).abs().max()) < 1e-6


def test_the_eps_that_stays_costs_little():
    """The deviation that clearhead.init.foreign states: 1e-5 (e^k - 1) at most."""
    model = gpt2().double().eval()
    ch.init_(model, "deepscale", embedding_correlation=0.1)
    with_eps = logits(model, "gpt2")
    without_eps(model)
    exact = logits(model, "gpt2")
    assert 0.0 < float((with_eps - exact).abs().max() / exact.abs().max()) < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_state_dict_half_precision_and_removal(name):
    model = MODELS[name]()
    ch.init_(model, "deepscale", batch=batch_for(name))
    expected = logits(model, name)
    rules = rules_of(model)
    assert len(rules) >= 2 * LAYERS
    keys = [key for key in model.state_dict() if RULE in key]
    assert len(keys) == len(rules)

    other = MODELS[name]()
    ch.init_(other, "deepscale", batch=batch_for(name), seed=5, k=1.0)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, name), expected)

    half = copy.deepcopy(model).to(torch.bfloat16)
    for path, rule in rules_of(half).items():
        assert rule.scale.dtype == torch.float32
        assert torch.equal(rule.scale, rules[path].scale)
    low = logits(half, name)
    assert low.dtype == torch.bfloat16
    assert float((low.float() - expected).abs().mean() / expected.abs().mean()) < 0.1

    plain = MODELS[name]()
    assert remove_rules(model) == len(rules)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules() if not _own(module))
    assert not torch.equal(logits(model, name), expected)
    assert torch.equal(logits(other, name), expected)  # a loaded or copied model has hooks of its own


def _own(module):
    return type(module).__module__.startswith("clearhead")


@pytest.mark.parametrize("name", MODELS)
def test_folding_the_rules_is_exact_and_saves_as_a_plain_model(name, tmp_path):
    model = MODELS[name]().double().eval()
    ch.init_(model, "deepscale", batch=batch_for(name))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    expected = logits(model, name)
    done = fold_rules(model)
    assert f"{len(anatomy_of(model).stacks) * LAYERS * 2 + (LAYERS if name == 't5' else 0)} factors" in done[0]
    assert not rules_of(model)
    torch.testing.assert_close(logits(model, name), expected, rtol=1e-10, atol=1e-10)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(loaded, name), expected, rtol=1e-10, atol=1e-10)


def test_admin_on_bert_profiles_trained_vectors():
    model = bert()
    batch = {**batch_for("bert"), "attention_mask": torch.ones(3, 16, dtype=torch.long)}
    report = ch.init_(model, "admin", batch=batch, seed=4)
    omegas = report.facts["omega"]["encoder"]
    assert omegas[0] == 1.0
    assert omegas == sorted(omegas)
    vectors = [p for name, p in model.named_parameters() if name.endswith(f"{RULE}.omega")]
    assert len(vectors) == 2 * LAYERS
    assert [float(p.detach()[0]) for p in vectors] == pytest.approx(omegas, abs=1e-5)
    model.train()
    model(**batch).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in vectors)

    # Against the sum written out, in eval mode.
    model = model.double().eval()
    with torch.no_grad():
        for p in vectors:
            p.add_(0.3 * torch.rand_like(p))
        found = model.bert(batch["input_ids"]).last_hidden_state
        x = model.bert.embeddings(batch["input_ids"])
        for layer in model.bert.encoder.layer:
            for end, f in (
                (layer.attention.output, lambda x, layer=layer: layer.attention.self(x)[0]),
                (layer.output, lambda x, layer=layer: layer.intermediate(x)),
            ):
                omega = getattr(end, RULE).omega
                x = end.LayerNorm(omega * x + end.dense(f(x)))
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)

    expected = logits(model, "bert")
    assert "12 vectors omega" in fold_rules(model)[0]
    torch.testing.assert_close(logits(model, "bert"), expected, rtol=1e-10, atol=1e-10)
    assert model.state_dict().keys() == bert().state_dict().keys()


def test_hugging_face_and_our_own_profile_agree():
    """Every branch adds its variance after dropout: the same rule as `clearhead.init.admin`."""
    model = bert(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.0)
    ch.init_(model, "admin", batch=batch_for("bert"))
    seen = []
    for layer in model.bert.encoder.layer:
        for end in (layer.attention.output, layer.output):
            end.dropout.register_forward_hook(lambda module, args, out: seen.append(float(out.var())))
    omegas = [float(p.detach()[0]) for name, p in model.named_parameters() if name.endswith(f"{RULE}.omega")]
    torch.manual_seed(0)
    with torch.no_grad():
        model.train()(**batch_for("bert"))
    steps = [b**2 - a**2 for a, b in itertools.pairwise(omegas[1:])]
    assert steps == pytest.approx(seen[1:-1], rel=0.15)  # expectation over dropout against one draw


def test_constant_omega_and_where_no_vector_can_stand():
    model = bert()
    report = ch.init_(model, "admin_constant", output_change="constant")
    assert set(report.residuals["bert.encoder.layer.0.output.dense"]) == {"branch_scale"}
    assert report.facts["omega"]["encoder"] == [round((2 * LAYERS) ** 0.5, 6)] * 2 * LAYERS
    ch.init_(model, "admin_constant", omega_form="vector")
    assert all(isinstance(rule, StreamRule) for rule in rules_of(model).values())

    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    with pytest.raises(UserError, match="cannot take a vector"):
        ch.init_(encoder, "admin_constant", omega_form="vector")


def test_torch_layers_take_constants():
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    report = ch.init_(encoder, "deepscale", embedding_correlation=0.2)
    assert sum(entry.count for entry in report.entries) == sum(p.numel() for p in encoder.parameters())
    assert encoder.train()(torch.randn(2, 5, 32)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "scheme", "options", "message"),
    [
        ("gpt2", "admin", {"batch": batch_for("gpt2")}, "Admin is for post-norm models"),
        ("bert", "admin", {}, "give batch="),
        ("gpt2", "deepscale", {"k": float(LAYERS)}, "lambda = 0 cannot be rewritten"),
        ("gpt2", "deepscale", {"k": LAYERS + 1.0}, "exceeds 1"),
        ("llama", "deepscale", {"constants": "published"}, "no gated feed-forward"),
    ],
)
def test_refusals_change_nothing(name, scheme, options, message):
    model = MODELS[name]()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        ch.init_(model, scheme, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_parallel_blocks_are_refused():
    config = transformers.GPTNeoXConfig(
        **SIZES, hidden_size=32, intermediate_size=64, num_hidden_layers=3, use_parallel_residual=True
    )
    with pytest.raises(UserError, match="one branch per residual sum"):
        ch.init_(transformers.GPTNeoXForCausalLM(config), "deepscale")


def test_the_hooks_compile_into_one_graph():
    """On torch's own layer, which compiles faster than Hugging Face's; those are in the full suite."""
    torch._dynamo.reset()
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    rule = BranchRule(0.5)
    module[0].add_module(RULE, rule)
    module[0].register_forward_hook(_scale_output)
    x = torch.randn(3, 8)
    expected = torch.nn.functional.layer_norm(
        0.5 * torch.nn.functional.linear(x, module[0].weight, module[0].bias), (8,)
    )
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    rule.scale.fill_(-0.5)
    torch.testing.assert_close(compiled(x), -expected, rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_compiled_in_one_graph(name):
    torch._dynamo.reset()
    model = MODELS[name]()
    scheme = "admin" if name == "bert" else "deepscale"
    ch.init_(model, scheme, batch=batch_for(name))
    model.eval()
    body = model.bert.encoder.layer[0] if name == "bert" else model.transformer
    arguments = (torch.randn(2, 8, 32),) if name == "bert" else (batch_for(name)["input_ids"],)
    first = lambda out: out if isinstance(out, torch.Tensor) else out[0]
    compiled = torch.compile(body, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(first(compiled(*arguments)), first(body(*arguments)), rtol=1e-5, atol=1e-5)


def test_deep_models_keep_their_signal():
    """48 layers of GPT-2 at initialisation: the logits move with the input, and gradients reach the first layer."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, n_positions=32, n_embd=64, n_layer=48, n_head=4)
    model = transformers.GPT2LMHeadModel(config)
    ch.init_(model, "deepscale", batch=batch_for("gpt2"))
    model.train()
    out = model(**batch_for("gpt2")).logits
    assert out.var().item() == pytest.approx(1.0, rel=0.2)
    (out * torch.randn_like(out)).sum().backward()
    norms = [
        sum(float(p.grad.square().sum()) for p in block.parameters() if p.dim() > 1) ** 0.5
        for block in model.transformer.h
    ]
    assert max(norms) / min(norms) < 3.0


def test_a_scaled_embedding_starts_smaller():
    """Gemma multiplies rows by sqrt(width) and norms by 1 + weight."""
    config = transformers.GemmaConfig(
        **SIZES, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_key_value_heads=2, head_dim=8,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = transformers.GemmaForCausalLM(config)
    report = ch.init_(model, "deepscale", embedding_correlation=0.1)
    assert report["model.embed_tokens.weight"].variance_asked == pytest.approx(1 / 32, rel=1e-6)
    assert report["model.layers.0.input_layernorm.weight"].draw == "0"
    assert logits(model, "gpt2").var().item() == pytest.approx(1.0, rel=0.3)
    with pytest.raises(UserError, match=r"1 \+ weight"):
        fold_rules(model)
