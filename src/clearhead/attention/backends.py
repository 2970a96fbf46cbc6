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
from clearhead.attention.plugins import load_plugins
from clearhead.attention.reference import reference_attention
from clearhead.attention.softmax import mask_kind, refuse_sdpa, sdpa_attention
from clearhead.attention.spec import Laser, Mean, Softmax
from clearhead.errors import unknown
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
    return "tiles of whole rows, scores made again in the backward pass, memory linear in length"


def _run_chunked(call: Call) -> Tensor:
    if isinstance(call.spec.read, Laser):
        return laser_tiled(call)
    out = chunked_attention(call.q, call.k, call.v, call.spec, call.mask, call.bias, call.scale, call.dropout_p)
    return out.to(call.q.dtype)


# ---- the truth ----


def _run_reference(call: Call) -> Tensor:
    return reference_attention(call.q, call.k, call.v, call.spec, call.mask, call.bias, call.scale, call.dropout_p)


BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("sdpa", _refuse_sdpa, _note_sdpa, _run_sdpa),
        Backend("chunked", _refuse_chunked, _note_chunked, _run_chunked),
        Backend("reference", lambda call: None, lambda call: "written out, N x M in memory", _run_reference),
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
