"""Masks of transformers as clearhead's `Mask`.

transformers builds the mask of a forward once, through the function that is registered under the attention's name, and
hands what that returns to every layer. Ours returns `VisibleKeys`: the conditions themselves (causal with its offset,
window, padding, packed documents), so that no N x M tensor need exist. A model that computes with its mask (slices it,
adds to it) gets the dense boolean tensor that transformers would have made.

What is not made of those conditions (a prefix that is seen both ways, chunks, blocks of an image) is asked from
transformers as a dense tensor. Inside a compiled graph all masks but the plain ones are: a graph cannot look into the
functions that transformers composes.

Shapes: b batch, h query heads, n queries, m keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from clearhead.attention.bias import DenseBias
from clearhead.attention.mask import Mask
from clearhead.attention.terms import Band, Causal, Segments, Term


@dataclass(frozen=True, eq=False)
class VisibleKeys:
    """What the mask function returns: looks like a boolean tensor [b, 1, n, m] to whoever computes with it."""

    mask: Mask
    """Its offset is given: the position of the first query among the keys."""
    shape: tuple[int, int, int, int]
    device: torch.device
    dropped: Tensor | int = 0
    """Tokens before the first key that a cache has let go of behind a window, padding not counted: a number, or [b]."""

    dtype = torch.bool
    ndim = 4
    requires_grad = False

    def dense(self) -> Tensor:
        """The boolean tensor [b, 1, n, m], True = visible."""
        b, _, n, m = self.shape
        seen = self.mask.dense_tensor(n, m, self.device)
        if seen is None:
            seen = torch.ones((), dtype=torch.bool, device=self.device)
        return seen.expand(b, 1, n, m)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A torch function sees the dense tensor."""
        return function(*_dense(args), **_dense(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __invert__(self) -> Tensor:
        return ~self.dense()

    def __and__(self, other: Any) -> Tensor:
        return self.dense() & _dense(other)

    def __or__(self, other: Any) -> Tensor:
        return self.dense() | _dense(other)

    __rand__, __ror__ = __and__, __or__

    def dim(self) -> int:
        """As of a tensor."""
        return 4

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return torch.Size(self.shape) if dim is None else self.shape[dim]

    def contiguous(self) -> VisibleKeys:
        """As of a tensor: `generate` asks for it."""
        return self

    def to(self, *args: Any, **keywords: Any) -> Any:
        """Moved to a device (accelerate does so between layers); made into a tensor where a dtype is asked."""
        device = keywords.get("device", args[0] if args else None)
        if torch.bool in (device, keywords.get("dtype")):
            return self
        if isinstance(device, torch.dtype) or "dtype" in keywords or isinstance(device, Tensor):
            return self.dense().to(*args, **keywords)
        moved = torch.device(device) if device is not None else self.device
        if moved == self.device:
            return self
        code, tensors = self.mask.encode()
        dropped = self.dropped.to(moved) if isinstance(self.dropped, Tensor) else self.dropped
        return VisibleKeys(Mask.decode(code, [t.to(moved) for t in tensors]), self.shape, moved, dropped)


def _dense(value: Any) -> Any:
    """The same arguments with dense tensors for `VisibleKeys`."""
    if isinstance(value, VisibleKeys):
        return value.dense()
    if isinstance(value, tuple | list):
        return type(value)(_dense(item) for item in value)
    if isinstance(value, dict):
        return {name: _dense(item) for name, item in value.items()}
    return value


# ---- what transformers calls ----------------------------------------------------------------------------------------


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Any = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **keywords: Any,
) -> Any:
    """The mask of one forward, in the signature of transformers' `AttentionMaskInterface`.

    Query i stands at q_offset + i, column j at kv_offset + j. `attention_mask` is padding, [b, seen tokens], or a
    mask that was made before.
    """
    if isinstance(attention_mask, VisibleKeys):
        return attention_mask
    from transformers import masking_utils

    device, mask_function = torch.device(device), mask_function or masking_utils.causal_mask_function
    valid = _columns(attention_mask, kv_length, kv_offset)
    terms = _terms(mask_function)
    causal_builder = "allow_is_bidirectional_skip" not in keywords  # only the bidirectional makers pass it
    skip = keywords.get("allow_is_causal_skip" if causal_builder else "allow_is_bidirectional_skip", True)
    packed = terms is not None and any(isinstance(term, Segments) for term in terms)
    wanted_dense = not skip and not packed and q_length > 1  # the model goes on to compute with it
    offset = _offset(q_offset, kv_offset, device)
    padding = Mask() if valid is None else hide_keys(valid)
    if terms is not None:
        made = Mask(terms, offset) & padding
    else:
        dense: Any = masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=cast(int, q_offset),
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        causal = causal_builder and _within_causal(dense, offset, mask_function, use_vmap)
        made = Mask((Causal(),) if causal else (), offset) & Mask.dense(dense) & padding
    dropped: Tensor | int = kv_offset
    if attention_mask is not None and (isinstance(kv_offset, Tensor) or kv_offset > 0):
        before = torch.arange(attention_mask.shape[1], device=attention_mask.device) < kv_offset
        dropped = (attention_mask.to(torch.bool) & before).sum(dim=1)
    visible = VisibleKeys(made, (batch_size, 1, q_length, kv_length), device, dropped)
    return visible.dense() if wanted_dense else visible


def _offset(q_offset: int | Tensor, kv_offset: int, device: torch.device) -> int | Tensor:
    if not torch.compiler.is_compiling():
        return int(q_offset) - kv_offset
    if isinstance(q_offset, Tensor):
        return (q_offset - kv_offset).reshape(1)
    # A number that changes from call to call is a symbol in a graph, which operators cannot take as text.
    return 0 if q_offset == kv_offset else torch.full((1,), q_offset - kv_offset, device=device)


def _columns(padding: Tensor | None, m: int, kv_offset: int) -> Tensor | None:
    """Which key columns hold a token, [b, m] bool; columns that padding does not reach are empty places of a cache."""
    if padding is None:
        return None
    valid = padding[:, kv_offset : kv_offset + m].to(torch.bool)
    missing = m - valid.shape[1]
    return torch.nn.functional.pad(valid, (0, missing)) if missing > 0 else valid


def hide_keys(valid_bm: Tensor) -> Mask:
    """A mask that hides keys that are not valid: nothing, a range per row where they are in one piece, or all of them.

    A range also says where a sequence begins, which patterns are anchored at.
    """
    m = valid_bm.shape[1]
    count = valid_bm.sum(dim=1)
    place = torch.arange(m, device=valid_bm.device)
    start = torch.where(valid_bm, place, m).amin(dim=1).clamp_max(m) if m else count
    end = torch.where(valid_bm, place + 1, 0).amax(dim=1) if m else count
    start = torch.minimum(start, end)
    if torch.compiler.is_compiling():
        return Mask.key_range(start, end) & Mask.dense(valid_bm[:, None, None, :])
    facts = torch.stack([(start > 0).any(), (end < m).any(), (end - start != count).any()])
    before, behind, holes = facts.tolist()  # one look at the device for all three
    ranges = Mask.key_range(start if before else None, end if behind else None)
    return ranges & Mask.dense(valid_bm[:, None, None, :]) if holes else ranges


# ---- transformers' composed functions -------------------------------------------------------------------------------


_KINDS: dict[Any, str] = {}
"""What the functions are that transformers composes masks of, by their code."""


_INTERSECTION = "and_mask"
"""What transformers calls a composed function; a compiled graph can read no more of it."""


def learn_kinds() -> None:
    """Fill the table of functions: once, before the first mask."""
    from transformers import masking_utils as made

    if _KINDS:
        return
    some = torch.zeros(1, 1, dtype=torch.long)
    examples: dict[str, Any] = {
        "and": made.and_masks(made.causal_mask_function),
        "window": made.sliding_window_overlay(1),
        "both sides": made.sliding_window_bidirectional_overlay(1),
        "packed": made.packed_sequence_mask_function(some),
    }
    remap = getattr(made, "remap_positions_for_packed_sequence", None)
    if remap is not None:
        examples["positions in documents"] = remap(made.causal_mask_function, some)
    _KINDS.update({function.__code__: name for name, function in examples.items()})


def _terms(function: Callable[..., Any]) -> tuple[Term, ...] | None:
    """The conditions that a function of transformers is made of; None when it is made of anything else."""
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return (Causal(),)
    if function is masking_utils.bidirectional_mask_function:
        return ()
    if torch.compiler.is_compiling():
        return None
    parts = _parts(function)
    if parts is None:
        return None
    causal = any(isinstance(part, Causal) for part in parts)
    terms: list[Term] = [Causal()] if causal else []
    for part in parts:
        if isinstance(part, int):  # a sliding window says only how far back
            if not causal:
                return None
            terms.append(Band(part - 1, 0))
        elif not isinstance(part, Causal):
            terms.append(part)
    return tuple(terms)


def _parts(function: Callable[..., Any]) -> list[Term | int] | None:
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return [Causal()]
    if function is masking_utils.bidirectional_mask_function:
        return []
    kind = _KINDS.get(getattr(function, "__code__", None))
    if kind is None:
        return None
    code, closure = function.__code__, function.__closure__ or ()
    held = {name: cell.cell_contents for name, cell in zip(code.co_freevars, closure, strict=True)}
    if kind == "window":
        return [held["sliding_window"]]
    if kind == "both sides":
        return [Band(held["sliding_window"], held["sliding_window"])]
    if kind == "packed":
        return [Segments(held["packed_sequence_mask"], held["packed_sequence_mask"])]
    if kind == "positions in documents":  # the same order inside a document, where packing hides all else
        return _parts(held["mask_function"])
    parts: list[Term | int] = []
    for inner in held["mask_functions"]:
        found = _parts(inner)
        if found is None:
            return None
        parts.extend(found)
    return parts


def _within_causal(dense: Tensor, offset: int | Tensor, function: Any, use_vmap: bool) -> bool:
    """Whether a dense mask of a causal model shows no future, so that patterns may treat the call as causal."""
    if torch.compiler.is_compiling():  # values cannot be read: an intersection with plain causality, or unknown
        return not use_vmap and function.__name__ == _INTERSECTION
    n, m = dense.shape[-2:]
    places = torch.arange(m, device=dense.device) - torch.arange(n, device=dense.device)[:, None]
    return not bool((dense & (places > offset)).any())


# ---- what a layer is given ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Seen:
    """Visibility of one call, and what its mask adds to the scores."""

    mask: Mask
    bias: DenseBias | None = None
    dropped: Tensor | int = 0
    """See `VisibleKeys`."""


def read(given: Any, n: int, m: int, b: int, *, causal: bool, window: int | None) -> Seen:
    """What a layer's mask says for n queries and m keys.

    `VisibleKeys` say it themselves. Without a mask, causality (bottom-right aligned: a lone query sees every key) and
    `window` are the layer's own. A tensor is as the model's own attention takes it: bool (True = visible), or float,
    added to the scores, with what lies at or below half the dtype's smallest number invisible. [b, m] is padding.

    Raises `ValueError` or `TypeError` for what fits none of these.
    """
    if given is None:
        return Seen(_own(causal, window))
    if isinstance(given, VisibleKeys):
        rows, _, queries, keys = given.shape
        if (queries, keys) != (n, m) or rows not in (1, b):
            raise ValueError(
                f"the mask is for {rows} sequences, {queries} queries and {keys} keys; the call has {b}, {n} and {m}"
            )
        return Seen(given.mask, dropped=given.dropped)
    if not isinstance(given, Tensor):
        raise TypeError(f"expected a tensor as mask, got {type(given).__name__}")
    if given.dim() == 2 and given.shape == (b, m) and (n, m) != (b, m) and not given.is_floating_point():
        return Seen(_own(causal, window) & hide_keys(given.bool()))
    return _tensor(given, n, causal)


def _own(causal: bool, window: int | None) -> Mask:
    if window is None:
        return Mask.causal() if causal else Mask()
    return Mask.window(window) if causal else Mask((Band(window - 1, window - 1),))


def _tensor(given: Tensor, n: int, causal: bool) -> Seen:
    if given.dim() not in (2, 4):
        raise ValueError(f"expected a mask [b, h, n, m] or [n, m], got shape {tuple(given.shape)}")
    full = given if given.dim() == 4 else given[None, None]
    if full.dtype == torch.bool:
        return Seen(_visible(full, n, causal))
    if not full.is_floating_point():
        raise TypeError(f"expected a mask of bool (True = attend) or float (added to scores), got {given.dtype}")
    if full.shape[2] > 1 and full.stride(2) == 0:
        full = full[:, :, :1]
    seen = full > torch.finfo(full.dtype).min / 2
    added = torch.where(seen, full, 0.0)
    plain = not given.requires_grad and not torch.compiler.is_compiling() and not bool(added.any())
    return Seen(_visible(seen, n, causal), None if plain else DenseBias(added))


def _visible(seen: Tensor, n: int, causal: bool) -> Mask:
    if seen.shape[2] > 1 and seen.stride(2) == 0:
        seen = seen[:, :, :1]  # one row, shown n times
    causal = causal and seen.shape[2] == n and not torch.compiler.is_compiling()
    if seen.shape[1:3] == (1, 1) and not causal:
        return hide_keys(seen[:, 0, 0])
    if causal:
        return _causal_part(seen)
    return Mask.dense(seen)


def _causal_part(seen: Tensor) -> Mask:
    """A dense mask of a causal layer, by its conditions where it shows no future: patterns then know where a sequence
    begins, and a mechanism without scores can take it."""
    n, m = seen.shape[-2:]
    dense = Mask.dense(seen)
    if seen.shape[1] > 1:
        return dense
    reach = int((seen.any(dim=2).any(dim=0)[0] * torch.arange(1, m + 1, device=seen.device)).amax())
    for offset in dict.fromkeys((reach - n, m - n)):  # a static cache's buffer is longer than what it holds
        plain = Mask.causal(offset) & hide_keys(seen.any(dim=2)[:, 0])
        if offset >= 0 and torch.equal(_all_of(plain, seen), seen):
            return plain
    past = torch.ones(n, m, dtype=torch.bool, device=seen.device).tril(m - n)
    return dense if bool((seen & ~past).any()) else Mask.causal(m - n) & dense


def _all_of(mask: Mask, like: Tensor) -> Tensor:
    tensor = mask.dense_tensor(like.shape[-2], like.shape[-1], like.device)
    return torch.ones_like(like) if tensor is None else tensor.expand_as(like)
