"""The backends and how one is chosen: each says why it refuses a call, or nothing. The first that does not refuse
serves.

GPU kernels join the same list: a name, a reason to refuse, a function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clearhead.attention import self_adjust as self_adjust  # registers its tile rule
from clearhead.attention.call import Call
from clearhead.attention.laser import laser_by_kernel, laser_tiled
from clearhead.attention.performer import performer_attention
from clearhead.attention.plugins import load_plugins
from clearhead.attention.reference import reference_attention
from clearhead.attention.softmax import mask_kind, refuse_sdpa, sdpa_attention
from clearhead.attention.spec import Laser, Mean, Performer, Softmax
from clearhead.errors import unknown
from clearhead.kernels import one_tile
from clearhead.kernels.chunked import chunked_attention
from clearhead.kernels.rule import TILE_RULES


@dataclass(frozen=True)
class Backend:
    """`refuse(call)` is the reason not to serve, or None; `note(call)` says how it serves; `run(call)` does."""

    name: str
    refuse: Callable[[Call], str | None]
    note: Callable[[Call], str]
    run: Callable[[Call], Tensor]


# ---- PyTorch's fused kernels ----


def _refuse_sdpa(call: Call) -> str | None:
    if isinstance(call.spec.weights, Performer):
        return "performer's weights are products of features, not a softmax of scores"
    if not isinstance(call.spec.weights, Softmax):
        return f"{call.spec.weights.name} changes the weights after the softmax, which a fused softmax cannot"
    if not isinstance(call.spec.read, Mean | Laser):
        return f"no fused kernel reads with {call.spec.read.name}"
    b, h, _, n, m = call.sizes
    if isinstance(call.spec.read, Laser) and torch.compiler.is_compiling():
        return (
            "LASER's guard reads the values' spread, which only an operator of its own may do inside a compiled graph"
        )
    return refuse_sdpa(call.mask, call.bias, b, h, n, m)


def _note_sdpa(call: Call) -> str:
    _, _, _, n, m = call.sizes
    kind = mask_kind(call.mask, n, m)
    how = {"none": "no mask needed", "causal": "its own causal flag", "dense": f"a {n} x {m} mask"}[kind]
    if call.bias is not None:
        how = f"a {n} x {m} mask with the bias in it"
    if call.dropout_p > 0.0:
        how += "; dropout sends PyTorch's CPU kernel to its slow path"
    if isinstance(call.spec.read, Laser):
        how += "; exp before and log after in float32; values of too large a spread go to the chunked kernel in float64"
    return f"PyTorch's fused kernel, {how}"


def _run_sdpa(call: Call) -> Tensor:
    call = call.on_seen_keys()
    if isinstance(call.spec.read, Laser):
        return laser_by_kernel(call, _sdpa_mean)
    return _sdpa_mean(call)


def _sdpa_mean(call: Call) -> Tensor:
    return sdpa_attention(call.q, call.k, call.v, call.mask, call.bias, call.scale, call.dropout_p)


# ---- our tiles ----


def _refuse_chunked(call: Call) -> str | None:
    if type(call.spec.weights) not in TILE_RULES:
        return f"{call.spec.weights.name} has no tile rule (see kernels/rule.py)"
    if not isinstance(call.spec.read, Mean | Laser):
        return f"no tiles for reading with {call.spec.read.name}"
    return None


def _note_chunked(call: Call) -> str:
    if one_tile.fits(call):
        return "few queries and no gradient: one tile, written out"
    return "tiles of whole rows, scores made again in the backward pass, memory linear in length"


def _run_chunked(call: Call) -> Tensor:
    few = one_tile.fits(call)
    if isinstance(call.spec.read, Laser):
        return laser_by_kernel(call.on_seen_keys(), one_tile.one_tile) if few else laser_tiled(call)
    if few:
        return one_tile.one_tile(call).to(call.q.dtype)
    out = chunked_attention(call.q, call.k, call.v, call.spec, call.mask, call.bias, call.scale, call.dropout_p)
    return out.to(call.q.dtype)


# ---- sums over random features ----


def _refuse_linear(call: Call) -> str | None:
    if not isinstance(call.spec.weights, Performer):
        return f"{call.spec.weights.name} weights are no product of features of query and key"
    if not isinstance(call.spec.read, Mean | Laser):
        return f"no sums for reading with {call.spec.read.name}"
    return None


def _note_linear(call: Call) -> str:
    width = getattr(call.spec.weights, "width", 0)
    how = "a recurrent state" if call.sums is not None else "chunks, features made again in the backward pass"
    return f"sums over {width} features, {how}, time and memory linear in length"


# ---- the truth ----


def _refuse_reference(call: Call) -> str | None:
    return None if call.sums is None else "a performer's recurrent state holds no keys to write scores of"


def _run_reference(call: Call) -> Tensor:
    return reference_attention(
        call.q, call.k, call.v, call.spec, call.mask, call.bias, call.scale, call.dropout_p, call.projection
    )


BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("sdpa", _refuse_sdpa, _note_sdpa, _run_sdpa),
        Backend("chunked", _refuse_chunked, _note_chunked, _run_chunked),
        Backend("linear", _refuse_linear, _note_linear, performer_attention),
        Backend("reference", _refuse_reference, lambda call: "written out, N x M in memory", _run_reference),
    )
}


def choose(call: Call, name: str = "auto") -> Backend:
    """The first backend that serves the call, or the named one; `ValueError` with its reason if that one refuses."""
    if name == "auto":
        return next(b for b in BACKENDS.values() if b.refuse(call) is None)
    if name not in BACKENDS:
        raise unknown("backend", name, ["auto", *BACKENDS])
    reason = BACKENDS[name].refuse(call)
    if reason is not None:
        raise ValueError(f"backend {name!r} refuses attention {call.spec.text!r}: {reason}; use backend='auto'")
    return BACKENDS[name]


load_plugins()  # a user's mechanisms join here, beside the built-in ones
