"""A patched model in use: generation, training with checkpointed gradients, autocast, compiled graphs."""

from __future__ import annotations

import pytest
import torch

import clearhead as ch
from tests.hf.tools import SPARSE, batch_of, build


@pytest.mark.parametrize("spec", ["softmax", "laser"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mistral-window", "gemma3-window"])
@pytest.mark.parametrize("way", ["greedy", "sample", "beams"])
def test_generation(name, spec, way):
    """Left padding, a cache, and what generation does to both. Softmax: the tokens of the model's own attention."""
    model, batch = build(name), batch_of(name, "left")
    batch.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0, "do_sample": way == "sample"}
    if way == "beams":
        options["num_beams"] = 3

    def written():
        torch.manual_seed(0)
        return model.generate(**batch, **options)

    own = written()
    ch.hf.patch(model, spec)
    mine = written()
    if spec == "softmax":
        assert torch.equal(mine, own)
    options["use_cache"] = False
    assert torch.equal(written(), mine)


@pytest.mark.parametrize("name", ["llama", "gemma3-window", "t5"])
def test_generation_with_a_static_cache(name):
    model, batch = build(name), batch_of(name, "left")
    batch.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0, "do_sample": False}
    ch.hf.patch(model, "laser")
    dynamic = model.generate(**batch, **options)
    static = model.generate(**batch, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, dynamic)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "bart"])
def test_gradient_checkpointing(name, reentrant):
    model, batch = build(name), batch_of(name, "right")
    ch.hf.patch(model, "laser")

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        model(**batch).logits.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for module in model.modules():  # in training mode, but nothing drawn at random
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name_of, value in list(vars(module).items()):
            if "dropout" in name_of and isinstance(value, float):
                setattr(module, name_of, 0.0)
    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for mine, own in zip(gradients(), plain, strict=True):
        assert (mine - own).abs().max() <= 1e-10 * max(1.0, own.abs().max().item())


@pytest.mark.parametrize("spec", ["softmax", "laser", "self_adjust", SPARSE])
def test_autocast(spec):
    model, batch = build("llama", double=False), batch_of("llama", "left", double=False)
    ch.hf.patch(model, spec)
    exact = model(**batch).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(**batch).logits
    valid = batch["attention_mask"].bool()
    assert rough.isfinite().all()
    assert (rough.float() - exact)[valid].abs().max() < 0.05 * exact[valid].abs().max()


FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("llama", "laser"),
        ("t5", "softmax"),
        pytest.param("mistral-window", "self_adjust", marks=FULL),
        pytest.param("llama", "softmax", marks=FULL),
        pytest.param("bert", "laser", marks=FULL),
        pytest.param("vit", "laser", marks=FULL),
        pytest.param("llama", SPARSE, marks=FULL),
    ],
)
def test_a_compiled_graph_gives_the_same(name, spec):
    model, batch = build(name, double=False), batch_of(name, "left" if name != "vit" else "none", double=False)
    more = {} if name == "vit" else {"use_cache": False} if name != "bert" else {}
    ch.hf.patch(model, spec)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        whole, expected = compiled(**batch, **more).logits, model(**batch, **more).logits
    valid = batch["attention_mask"].bool() if name not in ("vit", "t5") else slice(None)
    assert (whole - expected)[valid].abs().max() < 1e-5


@pytest.mark.full
def test_a_compiled_training_step_without_padding():
    model, batch = build("llama", double=False), batch_of("llama", double=False)
    ch.hf.patch(model, "laser")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def gradient(f):
        model.zero_grad()
        f(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    assert (gradient(compiled) - gradient(model)).abs().max() < 1e-6


@pytest.mark.full
@pytest.mark.parametrize(("name", "spec"), [("llama", "laser"), ("gemma3-window", "self_adjust")])
def test_compiled_decoding_from_a_static_cache(name, spec):
    """As generation on a GPU does it: the first tokens eager, then one graph for every further one."""
    from transformers import StaticCache

    model, batch = build(name, double=False), batch_of(name, "left", double=False)
    ch.hf.patch(model, spec)
    ids, padding = batch["input_ids"], batch["attention_mask"]
    positions = (padding.cumsum(-1) - 1).clamp_min(0)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        whole = model(**batch, position_ids=positions).logits
        cache = StaticCache(model.config, max_cache_len=16)
        model(ids[:, :8], attention_mask=padding[:, :8], position_ids=positions[:, :8], past_key_values=cache)
        for at in range(8, 12):
            one = slice(at, at + 1)
            step = compiled(
                ids[:, one], attention_mask=padding[:, : at + 1], position_ids=positions[:, one], past_key_values=cache
            )
            assert (step.logits[:, 0] - whole[:, at]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5", "vit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(name, dtype):
    model, batch = (
        build(name, double=False).to(dtype),
        batch_of(name, "left" if name != "vit" else "none", double=False),
    )
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    exact = build(name, double=False)
    rough = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    for one in (model, exact):
        ch.hf.patch(one, "laser")
    mine, wanted = model(**batch).logits, exact(**rough).logits
    assert mine.dtype == dtype
    valid = batch["attention_mask"].bool() if name in ("llama", "gemma2") else slice(None)
    assert (mine.float() - wanted)[valid].abs().max() < 0.06 * wanted[valid].abs().max()
