"""What a patched model must pass before `clearhead hf list` says that it works. Each check returns a problem or None.

`BEHAVIOUR` are checks of a model as it is, patched or not, so that a model whose own attention fails one can be told
from a patch that breaks it. The others compare a patched model with what it was. All run in eval mode; only outputs at
real tokens count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.hf import zoo
from clearhead.hf.zoo_entries import VOCABULARY, Entry

TOLERANCE = 1e-5
"""Largest difference in float32, relative to the largest output where that is above 1."""
Check = Callable[[nn.Module, Entry], str | None]
Batch = dict[str, Tensor]
SINGLE_STEPS, CHUNK = 6, 5


# ---- running a model ----


def outputs(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The logits, or else the last hidden state, of one forward."""
    return _tensor_of(model(**batch))


def _tensor_of(answer: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        found = getattr(answer, name, None)
        if isinstance(found, Tensor):
            return found
    raise TypeError(f"expected logits or last_hidden_state in the answer, got {type(answer).__name__}")


def real_tokens(model: nn.Module, entry: Entry, batch: Batch, out: Tensor) -> Tensor:
    """Which positions of `out` belong to real tokens, [b, n] bool."""
    mask = batch.get("attention_mask")
    if mask is None or entry.kind == "seq2seq" or out.dim() < 2 or out.shape[:2] != (2, _frames(model, entry, mask)):
        return torch.ones(out.shape[:2] if out.dim() > 1 else out.shape, dtype=torch.bool)
    if entry.kind == "speech":
        lengths: Any = model._get_feat_extract_output_lengths(mask.sum(-1))  # type: ignore[operator]
        return torch.arange(out.shape[1])[None] < lengths[:, None]
    return mask.bool()


def _frames(model: nn.Module, entry: Entry, mask: Tensor) -> int:
    length = mask.shape[1]
    return int(model._get_feat_extract_output_lengths(length)) if entry.kind == "speech" else length  # type: ignore


def difference(got: Tensor, wanted: Tensor, where: Tensor | None = None) -> str | None:
    """None when equal up to `TOLERANCE`; else how far apart."""
    if where is not None:
        got, wanted = got[where], wanted[where]
    if not bool(torch.isfinite(got).all()):
        return "the output is not finite at real tokens"
    apart = float((got - wanted).abs().max()) if got.numel() else 0.0
    size = max(1.0, float(wanted.abs().max()) if wanted.numel() else 0.0)
    return None if apart <= TOLERANCE * size else f"outputs differ by {apart:.1e}"


# ---- checks of a model as it is ----


def padding_edit(model: nn.Module, entry: Entry) -> str | None:
    """An edit of what stands at padding changes nothing at real tokens."""
    for side in zoo.paddings(entry):
        batch = zoo.inputs(entry, side)
        name = "input_values" if entry.kind == "speech" else "input_ids"
        noise = zoo.inputs(entry, side, seed=2)[name]
        edited = batch | {name: torch.where(batch["attention_mask"].bool(), batch[name], noise)}
        with torch.no_grad():
            before, after = outputs(model, batch), outputs(model, edited)
        problem = difference(after, before, real_tokens(model, entry, batch, before))
        if problem:
            return f"{side} padding is seen: {problem}"
    return None


def padding_absent(model: nn.Module, entry: Entry) -> str | None:
    """A sequence padded on the right gives what it gives alone, unpadded."""
    if "right" not in zoo.paddings(entry):
        return None
    batch = zoo.inputs(entry, "right")
    length = int(batch["attention_mask"][1].sum())
    alone = {
        name: value[1:, :length] if name != "decoder_input_ids" else value[1:]
        for name, value in batch.items()
        if name != "attention_mask"
    }
    with torch.no_grad():
        padded, bare = outputs(model, batch), outputs(model, alone)
    problem = difference(padded[1:, : bare.shape[1]], bare)
    return f"a sequence padded on the right is not what it is alone: {problem}" if problem else None


def future_edit(model: nn.Module, entry: Entry) -> str | None:
    """An edit of later tokens leaves earlier outputs (decoders, and the decoder of an encoder-decoder)."""
    name = {"decoder": "input_ids", "seq2seq": "decoder_input_ids"}.get(entry.kind)
    if name is None:
        return None
    for side in ("none", *zoo.paddings(entry)):
        batch = zoo.inputs(entry, side)
        length = batch[name].shape[1]
        for first in (length // 2, length - 1):
            edited = batch | {name: batch[name].clone()}
            edited[name][:, first:] = 3 + (edited[name][:, first:] - 3 + 7) % (VOCABULARY - 3)
            with torch.no_grad():
                before, after = outputs(model, batch), outputs(model, edited)
            real = real_tokens(model, entry, batch, before)[:, :first]
            problem = difference(after[:, :first], before[:, :first], real)
            if problem:
                return f"a later token is seen ({side} padding): {problem}"
    return None


def cached_decode(model: nn.Module, entry: Entry) -> str | None:
    """A prompt, single tokens and a chunk behind it, through the cache, equal the full forward."""
    if entry.kind not in ("decoder", "seq2seq"):
        return None
    name = "input_ids" if entry.kind == "decoder" else "decoder_input_ids"
    sides: tuple[zoo.Padding, ...] = ("none", "left") if "left" in zoo.paddings(entry) else ("none",)
    for side in sides:
        batch: dict[str, Any] = dict(zoo.inputs(entry, side))
        with torch.no_grad():
            if not _has_cache(model, batch):
                return None
            whole = outputs(model, batch)
            real = real_tokens(model, entry, batch, whole)
            if entry.kind == "seq2seq":
                source = {key: value for key, value in batch.items() if key != name}
                batch["encoder_outputs"] = model.get_encoder()(**source)  # type: ignore[operator]
                batch = {key: value for key, value in batch.items() if key not in ("input_ids", "input_features")}
            pieces, cache = [], None
            for first, last in _steps(batch[name].shape[1]):
                given = batch | {name: batch[name][:, first:last], "use_cache": True, "past_key_values": cache}
                if entry.kind == "decoder" and "attention_mask" in batch:
                    given["attention_mask"] = batch["attention_mask"][:, :last]
                answer = model(**given)
                cache = answer.past_key_values
                pieces.append(_tensor_of(answer))
        problem = difference(torch.cat(pieces, dim=1), whole, real)
        if problem:
            return f"decoding through the cache differs from the full forward ({side} padding): {problem}"
    return None


def _steps(length: int) -> Iterator[tuple[int, int]]:
    """Where the calls begin and end: a prompt, single tokens, the rest at once."""
    prompt = max(1, length - SINGLE_STEPS - CHUNK)
    yield 0, prompt
    for at in range(prompt, min(prompt + SINGLE_STEPS, length)):
        yield at, at + 1
    if prompt + SINGLE_STEPS < length:
        yield prompt + SINGLE_STEPS, length


def _has_cache(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    try:
        return getattr(model(**batch, use_cache=True), "past_key_values", None) is not None
    except TypeError:  # a model without the keyword (OpenAI's first GPT)
        return False


def gradients(model: nn.Module, entry: Entry, names: tuple[str, ...]) -> str | None:
    """Every parameter of the named layers gets a finite gradient; a matrix, one that is not all 0.

    A vector may get none: softmax does not see a bias of the keys.
    """
    sides = zoo.paddings(entry)
    batch = zoo.inputs(entry, sides[0] if sides else "none")
    model.zero_grad(set_to_none=True)
    try:
        out = outputs(model, batch)
        real = real_tokens(model, entry, batch, out)
        weights = torch.randn(out[real].shape, generator=torch.Generator().manual_seed(3))
        (out[real].float() * weights).sum().backward()
        for name in names:
            for part, parameter in model.get_submodule(name).named_parameters():
                if not parameter.requires_grad:
                    continue
                if parameter.grad is None:
                    return f"{name}.{part} gets no gradient"
                if not bool(torch.isfinite(parameter.grad).all()):
                    return f"the gradient of {name}.{part} is not finite"
                if parameter.dim() > 1 and not bool(parameter.grad.any()):
                    return f"the gradient of {name}.{part} is all 0"
    finally:
        model.zero_grad(set_to_none=True)
    return None


BEHAVIOUR: dict[str, Check] = {
    "padding edit": padding_edit,
    "padding absent": padding_absent,
    "future edit": future_edit,
    "cached decode": cached_decode,
}
"""By name; `gradients` is beside them, with the layers that a patch reports."""


# ---- comparing a patched model with what it was ----


@dataclass(frozen=True)
class Before:
    """What a model gave before it was patched: one output for each way of padding, and its parameters' names."""

    outs: tuple[Tensor, ...]
    names: tuple[str, ...]
    implementation: str | None

    @classmethod
    def of(cls, model: nn.Module, entry: Entry) -> Before:
        """Run the model as it is."""
        with torch.no_grad():
            outs = tuple(outputs(model, zoo.inputs(entry, side)) for side in ("none", *zoo.paddings(entry)))
        return cls(outs, tuple(model.state_dict()), getattr(model.config, "_attn_implementation", None))


def every_layer_called(report: Any, entry: Entry) -> str | None:
    """The patch reports as many layers of attention as the architecture has, and each called at the probe."""
    silent = [layer.name for layer in report.layers if layer.calls < 1]
    if silent:
        return f"{silent[0]} never called the patch"
    if len(report.layers) != entry.attentions:
        return f"the patch reports {len(report.layers)} layers of attention, the architecture has {entry.attentions}"
    return None


def equals_own(model: nn.Module, entry: Entry, before: Before) -> str | None:
    """The outputs are those of the model's own attention (under softmax, and under a temperature at its start)."""
    for side, wanted in zip(("none", *zoo.paddings(entry)), before.outs, strict=True):
        batch = zoo.inputs(entry, side)
        with torch.no_grad():
            out = outputs(model, batch)
        problem = difference(out, wanted, real_tokens(model, entry, batch, out))
        if problem:
            return f"not the model's own attention ({side} padding): {problem}"
    return None


def unpatched(model: nn.Module, entry: Entry, before: Before) -> str | None:
    """After `unpatch`: the outputs bit by bit, the parameters' names and the implementation of before."""
    for side, wanted in zip(("none", *zoo.paddings(entry)), before.outs, strict=True):
        with torch.no_grad():
            out = outputs(model, zoo.inputs(entry, side))
        if not torch.equal(out.nan_to_num(), wanted.nan_to_num()):
            return f"unpatch does not give back the outputs ({side} padding)"
    if tuple(model.state_dict()) != before.names:
        return "unpatch leaves other parameters than there were"
    after = getattr(model.config, "_attn_implementation", None)
    return None if after == before.implementation else f"unpatch leaves the implementation {after!r}"


def stir_added(model: nn.Module, before: Before) -> int:
    """Move the parameters that the patch added from their start, where they do nothing; returns how many there are."""
    added = 0
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in before.names:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw).to(parameter))
                added += 1
    return added
