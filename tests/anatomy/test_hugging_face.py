"""The anatomy of Hugging Face's models, held against what the models really compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clearhead.anatomy.find import anatomy_of
from clearhead.anatomy.parts import AttentionParts, FeedForwardParts
from clearhead.anatomy.search import matrices_of
from tests.anatomy.hf_models import HEADS, HIDDEN, LAYERS, MODELS, PLACEMENT, WIDTH, batch_for, build

NAMES = sorted(MODELS)
PARALLEL = {"gptj", "gpt_neox", "phi", "falcon"}
TWO_STACKS = {"t5", "t5-gated", "bart", "mbart", "marian", "whisper"}
GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2", "t5-gated"}
GROUPED = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2", "falcon"}
UNNAMED = {  # what plays no part in a block, an embedding or the head
    "bert": ("cls.predictions.transform",),
    "roberta": ("lm_head.dense", "lm_head.layer_norm"),
    "distilbert": ("vocab_",),
    "electra": ("discriminator_predictions", "electra.embeddings_project"),
    "t5": ("relative_attention_bias",),
    "t5-gated": ("relative_attention_bias",),
    "whisper": ("conv1", "conv2"),
    "vit": ("cls_token", "patch_embeddings"),
}


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """First input and output of each module in its first call."""
    seen: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            first = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            answer = output[0] if isinstance(output, tuple) else output
            seen.setdefault(name, (first.detach().clone(), answer.detach().clone()))  # Falcon adds in place later

        return hook

    with ExitStack() as held:
        for name, module in modules.items():
            held.callback(module.register_forward_hook(watch(name), with_kwargs=True).remove)
        yield seen


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_complete(name: str) -> None:
    anatomy = anatomy_of(build(name))
    assert len(anatomy.stacks) == (2 if name in TWO_STACKS else 1)
    assert anatomy.width == WIDTH
    wanted = UNNAMED.get(name, ())
    assert all(any(part in parameter for part in wanted) for parameter in anatomy.unknown), anatomy.unknown
    assert all(any(part in parameter for parameter in anatomy.unknown) for part in wanted)
    for stack in anatomy.stacks:
        assert len(stack.blocks) == LAYERS
        for block in stack.blocks:
            assert block.parallel == (name in PARALLEL)
            crossed = name in TWO_STACKS and stack.name == "decoder"
            assert [sub.part for sub in block.sublayers] == (
                ["attention", "cross_attention", "feed_forward"] if crossed else ["attention", "feed_forward"]
            )
            for sub in block.sublayers:
                assert sub.placement == PLACEMENT[name]
                if isinstance(sub.branch, AttentionParts):
                    assert (sub.branch.heads, sub.branch.head_dim) == (HEADS, WIDTH // HEADS)
                    assert sub.branch.kv_heads == (2 if name in GROUPED else HEADS)
                    assert sub.branch.query.shape == (WIDTH, WIDTH)
                    assert sub.branch.key.shape == sub.branch.value.shape == (sub.branch.kv_heads * 8, WIDTH)
                    assert sub.branch.causal == (stack.name == "decoder" and sub.part == "attention")
                else:
                    assert isinstance(sub.branch, FeedForwardParts)
                    assert (sub.branch.gate is not None) == (name in GATED)
                    hidden = sub.branch.up.shape[0]
                    assert sub.branch.down.shape == (WIDTH, hidden)
                    assert hidden in (HIDDEN, 4 * WIDTH)


@pytest.mark.parametrize("name", NAMES)
def test_norms_and_branches_stand_on_the_stream(name: str) -> None:
    """In eval mode the stream is an exact sum: what each norm reads must be the stream that the anatomy says."""
    model = build(name).eval()
    anatomy = anatomy_of(model)
    modules: dict[str, nn.Module] = {}
    for s, stack in enumerate(anatomy.stacks):
        for b, block in enumerate(stack.blocks):
            modules[f"{s}.{b}"] = block.module
            for sub in block.sublayers:
                if sub.norm is not None:
                    modules[f"{s}.{b}.{sub.part}.norm"] = sub.norm
                if sub.branch_norm is not None:
                    modules[f"{s}.{b}.{sub.part}.behind"] = sub.branch_norm
                last = sub.branch.output if isinstance(sub.branch, AttentionParts) else sub.branch.down
                modules[f"{s}.{b}.{sub.part}.branch"] = last.module
    with recorded(modules) as seen, torch.no_grad():
        model(**batch_for(name))
    for s, stack in enumerate(anatomy.stacks):
        for b, block in enumerate(stack.blocks):
            x, out = seen[f"{s}.{b}"]
            stream = x
            for sub in block.sublayers:
                place = f"{s}.{b}.{sub.part}"
                branch = seen[f"{place}.behind" if sub.branch_norm is not None else f"{place}.branch"][1]
                if sub.placement == "pre" and sub.norm is not None:
                    read = x if block.parallel else stream
                    torch.testing.assert_close(seen[f"{place}.norm"][0].reshape(x.shape), read.reshape(x.shape))
                stream = stream + branch.reshape(x.shape)
                if sub.placement == "post" and sub.norm is not None:
                    torch.testing.assert_close(seen[f"{place}.norm"][0].reshape(x.shape), stream)
                    stream = seen[f"{place}.norm"][1].reshape(x.shape)
            torch.testing.assert_close(stream, out.reshape(x.shape))


class Spy(TorchFunctionMode):
    """Keeps query, key and value of the first fused attention call."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv: tuple[Tensor, Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and self.qkv is None:
            self.qkv = args[:3]
        return func(*args, **(kwargs or {}))


FUSED = [
    n for n in NAMES if n not in ("gpt_neo", "gptj", "bloom", "gemma2", "t5", "t5-gated", "qwen3", "olmo2", "falcon")
]


@pytest.mark.parametrize("name", FUSED)
def test_query_key_and_value_matrices_make_what_attention_reads(name: str) -> None:
    """Rotary positions turn but do not stretch, so each head's length must be the one that the parts give."""
    model = build(name).eval()
    part = anatomy_of(model).attentions[0]
    read: list[Tensor] = []
    hook = part.query.module.register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))
    with Spy() as spy, torch.no_grad():
        model(**batch_for(name))
    hook.remove()
    assert spy.qkv is not None
    x = read[0]
    for matrix, got, exact in zip((part.query, part.key, part.value), spy.qkv, (False, False, True), strict=True):
        made = x @ matrix.weight().mT
        bias = matrix.bias()
        made = (made if bias is None else made + bias).unflatten(-1, (-1, part.head_dim)).transpose(1, 2)
        made = made.repeat_interleave(got.shape[1] // made.shape[1], dim=1)
        if exact:
            torch.testing.assert_close(made, got)
        else:
            ratio = got.norm(dim=-1) / made.norm(dim=-1).clamp_min(1e-9)
            early = name in ("whisper", "opt", "opt-post") and matrix is part.query  # these scale the queries first
            wanted = part.head_dim**-0.5 if early else 1.0
            torch.testing.assert_close(ratio, torch.full_like(ratio, wanted), rtol=1e-4, atol=1e-4)


def test_numbers_that_the_config_says() -> None:
    t5 = anatomy_of(build("t5"))
    assert all(part.scale == 1.0 for part in t5.attentions)
    assert t5.head_scale == pytest.approx(WIDTH**-0.5)
    assert all(part.dropout == 0.1 for part in t5.attentions)
    assert t5.stacks[0].blocks[0].sublayers[1].branch.dropout == 0.1
    neo = anatomy_of(build("gpt_neo"))
    assert all(part.scale == 1.0 for part in neo.attentions)
    assert anatomy_of(build("llama")).attentions[0].scale is None
    assert anatomy_of(build("llama")).attentions[0].rope_base == 10000.0
    assert anatomy_of(build("bert")).attentions[0].rope_base is None
    assert anatomy_of(build("gemma")).stacks[0].embedding_scale == pytest.approx(WIDTH**0.5)
    assert anatomy_of(build("marian")).stacks[1].embedding_scale == pytest.approx(WIDTH**0.5)
    assert anatomy_of(build("gemma2")).attentions[0].scale == pytest.approx(256**-0.5)


def test_dropout_rates() -> None:
    gpt2 = anatomy_of(build("gpt2", resid_pdrop=0.2, attn_pdrop=0.3, embd_pdrop=0.4))
    attention, feed_forward = gpt2.stacks[0].blocks[1].sublayers
    assert (attention.dropout, attention.branch.dropout) == (0.2, 0.3)
    assert (feed_forward.dropout, feed_forward.branch.dropout) == (0.2, 0.0)
    assert gpt2.stacks[0].embedding_dropout == 0.4
    bert = anatomy_of(build("bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3))
    attention, feed_forward = bert.stacks[0].blocks[0].sublayers
    assert (attention.dropout, attention.branch.dropout, feed_forward.dropout) == (0.2, 0.3, 0.2)
    bart = anatomy_of(build("bart", dropout=0.2, attention_dropout=0.3, activation_dropout=0.4))
    for sub in bart.stacks[1].blocks[0].sublayers:
        assert sub.dropout == 0.2
        assert sub.branch.dropout == (0.4 if sub.part == "feed_forward" else 0.3)


@pytest.mark.parametrize(
    ("name", "activation"),
    [("gpt2", "gelu_tanh"), ("bert", "gelu"), ("llama", "silu"), ("opt", "relu"), ("t5", "relu"),
     ("gemma", "gelu_tanh"), ("t5-gated", "gelu_tanh"), ("bloom", "gelu_tanh")],
)  # fmt: skip
def test_activation_is_found_by_its_values(name: str, activation: str) -> None:
    branch = anatomy_of(build(name)).stacks[0].blocks[0].sublayers[-1].branch
    assert isinstance(branch, FeedForwardParts)
    assert branch.activation == activation


def test_ends_of_the_model() -> None:
    bert = anatomy_of(build("bert"))
    assert [table.role for table in bert.stacks[0].embeddings] == ["token", "position", "segment"]
    assert bert.stacks[0].embedding_norm_path == "bert.embeddings.LayerNorm"
    assert bert.stacks[0].final_norm is None
    assert bert.head is not None
    assert bert.head.path == "cls.predictions.decoder"
    assert bert.head_tied
    assert bert.stacks[0].blocks[0].sublayers[0].residual_module is not None
    llama = anatomy_of(build("llama"))
    assert not llama.head_tied
    assert llama.stacks[0].final_norm_path == "model.norm"
    bart = anatomy_of(build("bart"))
    assert [[table.role for table in stack.embeddings] for stack in bart.stacks] == [["token", "position"]] * 2
    assert anatomy_of(build("mbart")).stacks[0].final_norm_path == "model.encoder.layer_norm"


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "falcon", "phi3", "llama"])
def test_parts_of_a_fused_matrix_are_written_apart(name: str) -> None:
    model = build(name)
    part = anatomy_of(model).attentions[1]
    before = {role: matrix.weight().clone() for role, matrix in matrices_of(part).items()}
    new = torch.randn(part.key.shape)
    part.key.write(new)
    for role, matrix in matrices_of(part).items():
        torch.testing.assert_close(matrix.weight(), new if role == "key" else before[role])
    if part.key.bias() is not None:
        part.key.write_bias(torch.ones(part.key.shape[0]))
        assert part.key.bias().sum() == part.key.shape[0]  # type: ignore[union-attr]
        assert part.value.bias().abs().sum() == 0  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"expected values of shape"):
        part.key.write(torch.zeros(3, 3))


def test_a_gradient_is_cut_like_its_parameter() -> None:
    model = build("gpt_neox")
    part = anatomy_of(model).attentions[0]
    whole = part.query.module.weight  # type: ignore[union-attr]
    marks = torch.arange(whole.numel(), dtype=torch.float32).reshape(whole.shape)
    rows = marks.reshape(HEADS, 3, 8, WIDTH)
    for index, matrix in enumerate((part.query, part.key, part.value)):
        torch.testing.assert_close(matrix.of(marks), rows[:, index].reshape(WIDTH, WIDTH))
