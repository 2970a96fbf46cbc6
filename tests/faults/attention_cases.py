"""Attention calls of every sort, sound or with one thing wrong, drawn by hypothesis; and how a call is judged.

A call must give a finite result of the right shape that equals the float64 reference, or an exception of ours: raised
by a `raise` in a file of clearhead, a ValueError or TypeError, with a message.
"""

from __future__ import annotations

import linecache
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import clearhead
from clearhead.attention.attend import attend
from clearhead.attention.bias import ALiBi, Bias, DenseBias
from clearhead.attention.mask import Mask
from clearhead.attention.selective import Temperatures, selective
from clearhead.attention.spec import AttentionSpec
from clearhead.memory.cache import KVCache

PACKAGE = str(Path(clearhead.__file__).parent)
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp64": 1e-9, "fp32": 2e-4, "bf16": 6e-2, "fp16": 1.5e-2}

LENGTHS = (0, 1, 1, 2, 3, 5, 8, 17, 40)
WEIGHTS = (
    *("softmax", "softmax", "self_adjust", "self_adjust:form=product", "self_adjust:form=min_shift"),
    *("self_adjust:form=minmax", "self_adjust:detach_extrema=true", "performer:features=8"),
    *("performer:kernel=relu,features=8", "performer:kernel=trigonometric,features=8"),
)
READS = ("", "", "laser", "mean")
PATTERNS = (
    "",
    "",
    "window:1",
    "window:3",
    "window:500",
    "bigbird:block_size=2,random_blocks=1",
    "bigbird:block_size=64",
)
TEMPERATURES = ("", "", "selective", "learned")
MASKS = ("none", "none", "causal", "prefix", "lengths", "range", "segments", "dense", "dense one head", "nothing seen")
BIASES = ("none", "none", "none", "alibi", "dense", "dense row")
FORMS = ("plain", "plain", "transposed", "expanded", "strided", "reversed heads")
WRONG = (
    *(
        "query heads",
        "head dim",
        "batch",
        "value length",
        "dtype",
        "three dims",
        "integers",
        "mask shape",
        "bias shape",
    ),
    *("no temperatures", "temperature shape", "dropout", "backend", "spec", "want", "a list", "offset"),
)
BAD_SPECS = (
    "",
    "+",
    "softmax+softmax",
    "laser:3",
    "window",
    "window:0",
    "window:x",
    "windw:3",
    "softmax:a=b",
    "é",
    7,
    None,
)


@dataclass
class Drawn:
    """One call: everything but the tensors, which `seed` decides."""

    seed: int
    b: int
    g: int
    times: int
    n: int
    m: int
    d: int
    e: int
    dtype: str
    spec: str
    mask: str
    bias: str
    temperature: str
    form: str
    backend: str
    gradients: tuple[bool, bool, bool]
    size: float
    scale: float | None
    dropout: float
    cached: bool
    wrong: str | None
    want: tuple[str, ...] = ()

    @property
    def h(self) -> int:
        return self.g * self.times


@st.composite
def calls(draw: Any) -> Drawn:
    n = draw(st.sampled_from(LENGTHS))
    parts = [draw(st.sampled_from(choices)) for choices in (WEIGHTS, READS, PATTERNS, TEMPERATURES)]
    return Drawn(
        seed=draw(st.integers(0, 1 << 20)),
        b=draw(st.sampled_from((1, 2, 3, 0))),
        g=draw(st.integers(1, 2)),
        times=draw(st.integers(1, 3)),
        n=n,
        m=draw(st.sampled_from((n, n, *LENGTHS))),
        d=draw(st.sampled_from((1, 2, 4, 7, 16))),
        e=draw(st.sampled_from((1, 4, 7, 16))),
        dtype=draw(st.sampled_from(("fp32", "fp32", "fp64", "bf16", "fp16"))),
        spec="+".join(part for part in parts if part),
        mask=draw(st.sampled_from(MASKS)),
        bias=draw(st.sampled_from(BIASES)),
        temperature=parts[3],
        form=draw(st.sampled_from(FORMS)),
        backend=draw(st.sampled_from(("auto",) * 6 + ("sdpa", "chunked", "chunked", "linear", "reference"))),
        gradients=draw(st.sampled_from(((True,) * 3, (False,) * 3, (True, False, False), (False, False, True)))),
        size=draw(st.sampled_from((1.0, 1.0, 1.0, 0.0, 30.0))),
        scale=draw(st.sampled_from((None, None, 0.5, 0.0, -1.0, 1))),
        dropout=draw(st.sampled_from((0.0,) * 6 + (0.5, 1.0))),
        cached=draw(st.sampled_from((False,) * 5 + (True,))),
        wrong=draw(st.sampled_from((None,) * 3 * len(WRONG) + WRONG)),
        want=draw(st.sampled_from(((),) * 6 + (("weights", "entropy"), ("lse", "max_score", "max_weight", "visible")))),
    )  # fmt: skip


@dataclass
class Made:
    """The tensors and arguments of a drawn call."""

    q: Any
    k: Any
    v: Any
    spec: Any
    arguments: dict[str, Any] = field(default_factory=dict)


def made(call: Drawn) -> Made:
    gen = torch.Generator().manual_seed(call.seed)
    dtype, wide = DTYPES[call.dtype], torch.float64 if call.dtype == "fp64" else torch.float32

    def rand(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=gen).to(of)

    b, h, g, n, m = call.b, call.h, call.g, call.n, call.m
    q, k, v = rand(b, h, n, call.d) * call.size, rand(b, g, m, call.d), rand(b, g, m, call.e)
    q, k, v = (formed(x, call.form) for x in (q, k, v))
    arguments: dict[str, Any] = {
        "mask": mask_of(call, gen), "bias": bias_of(call, gen, wide), "scale": call.scale, "dropout_p": call.dropout,
        "backend": call.backend, "want": call.want,
    }  # fmt: skip
    if call.temperature == "learned":
        arguments["temperatures"] = Temperatures(query=0.5 + torch.rand(1, h, 1, 1, generator=gen).to(wide))
    elif call.temperature == "selective":
        tau = [0.5 + torch.rand(*size, generator=gen).to(wide) for size in ((b, h, n), (b, g, m, 1))]
        arguments["temperatures"] = (
            Temperatures(value=tau[1]) if "performer" in call.spec else Temperatures(*tau[:1], value=tau[1])
        )
    spec: Any = call.spec
    if call.wrong is not None:
        q, k, v, spec = spoil(call, gen, q, k, v, spec, arguments)
    if call.wrong not in ("integers", "a list"):
        for x, yes in zip((q, k, v), call.gradients):
            if isinstance(x, Tensor) and x.is_floating_point() and yes and not call.cached:
                x.requires_grad_(True)
    return Made(q, k, v, spec, arguments)


def formed(x: Tensor, form: str) -> Tensor:
    """The same numbers (of some forms: fewer different ones) in another layout."""
    if form == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if form == "expanded" and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    if form == "strided":
        return torch.stack((x, x), dim=-1).flatten(-2)[..., ::2]
    if form == "reversed heads":
        return x.flip(1).mT.contiguous().mT
    return x


def mask_of(call: Drawn, gen: torch.Generator) -> Mask | None:
    b, h, n, m = call.b, call.h, call.n, call.m
    ints = lambda low, high, *shape: torch.randint(low, high, shape, generator=gen)
    made = {
        "none": lambda: None,
        "causal": Mask.causal,
        "prefix": lambda: Mask.causal(prefix=2),
        "lengths": lambda: Mask.causal() & Mask.key_lengths(ints(0, m + 3, b)),
        "range": lambda: Mask.key_range(ints(0, 3, b), ints(0, m + 1, b)),
        "segments": lambda: Mask.causal() & Mask.segments(ints(-1, 2, b, n), ints(-1, 2, b, m)),
        "dense": lambda: Mask.dense(ints(0, 2, b, h, n, m).bool()),
        "dense one head": lambda: Mask.dense(ints(0, 2, b, 1, n, m).bool()) & Mask.causal(),
        "nothing seen": lambda: Mask.dense(torch.zeros(1, 1, n, m, dtype=torch.bool)),
    }
    return made[call.mask]()


def bias_of(call: Drawn, gen: torch.Generator, dtype: torch.dtype) -> Bias | None:
    shape = {"dense": (call.b, call.h, call.n, call.m), "dense row": (1, call.h, 1, call.m)}.get(call.bias)
    if shape is not None:
        return DenseBias(torch.randn(*shape, generator=gen).to(dtype))
    return ALiBi(ALiBi.default_slopes(call.h).to(dtype)) if call.bias == "alibi" else None


def spoil(
    call: Drawn, gen: torch.Generator, q: Any, k: Any, v: Any, spec: Any, arguments: dict[str, Any]
) -> tuple[Any, Any, Any, Any]:
    """Make one thing wrong (which may happen to be right all the same)."""
    wrong, b, n, m = call.wrong, call.b, call.n, call.m
    if wrong == "query heads":
        q = torch.cat((q, q[:, :1]), dim=1)
    elif wrong == "head dim":
        q = torch.cat((q, q), dim=-1)
    elif wrong == "batch":
        k = torch.cat((k, k, k))[: b + 1]
    elif wrong == "value length":
        v = torch.cat((v, v[:, :, :1]), dim=2) if m else v
    elif wrong == "dtype":
        k = k.to(torch.float64 if k.dtype != torch.float64 else torch.float32)
    elif wrong == "three dims":
        v = v[0] if b else v.flatten(0, 1)
    elif wrong == "integers":
        q, k, v = (x.long() for x in (q, k, v))
    elif wrong == "a list":
        k = k.tolist()
    elif wrong == "mask shape":
        arguments["mask"] = Mask.dense(torch.ones(b + 1, 2, n + 1, max(m, 2) + 1, dtype=torch.bool))
    elif wrong == "offset":
        arguments["mask"] = Mask.causal(torch.zeros(b + 2, dtype=torch.int64))
    elif wrong == "bias shape":
        arguments["bias"] = DenseBias(torch.zeros(1, call.h + 1, n, m))
    elif wrong == "no temperatures":
        given = arguments.pop("temperatures", None)
        arguments["temperatures"] = Temperatures(query=torch.ones(1, 1, 1, 1)) if given is None else None
    elif wrong == "temperature shape":
        arguments["temperatures"] = Temperatures(query=torch.ones(b + 1, call.h, n + 1, 1))
    elif wrong == "dropout":
        arguments["dropout_p"] = (-0.1, 1.5, float("nan"))[call.seed % 3]
    elif wrong == "backend":
        arguments["backend"] = ("sdap", "", "CHUNKED")[call.seed % 3]
    elif wrong == "want":
        arguments["want"] = ("weigths",)
    elif wrong == "spec":
        spec = BAD_SPECS[call.seed % len(BAD_SPECS)]
    return q, k, v, spec


# ---- judging ----


class NotOurs(AssertionError):
    """A call ended in an exception that clearhead did not raise on purpose."""


def ours(error: Exception) -> bool:
    """Whether a `raise` in a file of clearhead made it, of the right type and with a message."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(last.filename, last.lineno or 0)
    raised = last.filename.startswith(PACKAGE) and "raise" in line
    return raised and isinstance(error, ValueError | TypeError) and len(str(error)) > 10


def judge(call: Drawn) -> str:
    """Carry a call out and hold it to the truth; return "result" or "refused". Raises `AssertionError`."""
    try:
        make = made(call)
        out, grads = carried_out(call, make)
    except Exception as error:
        if ours(error):
            return "refused"
        raise NotOurs(f"{type(error).__name__}: {error}") from error
    shape = (make.q.shape[0], make.q.shape[1], make.q.shape[2], make.v.shape[-1])
    assert tuple(out.shape) == shape, f"shape {tuple(out.shape)}, expected {shape}"
    assert out.dtype == make.q.dtype, f"dtype {out.dtype}, expected {make.q.dtype}"
    assert out.isfinite().all(), "the result is not finite"
    counted(make)
    steep = call.dtype == "fp16" or any(f in call.spec for f in ("range", "minmax", "trigonometric", "self_adjust"))
    for name, grad in grads.items():
        assert grad.shape == getattr(make, name).shape
        assert steep or grad.isfinite().all(), f"the gradient of {name} is not finite"
    if call.dropout == 0.0 and "trigonometric" not in call.spec and out.numel():
        truth = exact(call, make)
        error = float((out.double() - truth).norm() / truth.norm().clamp_min(0.1 * truth.numel() ** 0.5))
        assert error <= TOLERANCE[call.dtype], f"relative error {error:.2e}"
    return "result"


def counted(make: Made) -> None:
    """How many keys each query sees, as it is counted, is how many the dense mask shows."""
    spec = AttentionSpec.parse(make.spec) if isinstance(make.spec, str) else make.spec
    (_, h, n, _), m = make.q.shape, make.k.shape[2]
    mask = spec.pattern.within(make.arguments["mask"] or Mask(), h, m).resolve(n, m)
    dense, told = mask.dense_tensor(n, m, make.q.device), mask.visible_count(n, m, make.q.device)
    true = torch.tensor(m) if dense is None else dense.expand(*dense.shape[:2], n, m).sum(-1)
    assert (told == true).all(), f"visible_count says {told.tolist()}, the mask {true.tolist()}"


def carried_out(call: Drawn, make: Made) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the call, through a cache in two pieces where that is drawn."""
    if call.cached and call.wrong is None:
        return through_a_cache(call, make), {}
    out = attend(make.q, make.k, make.v, make.spec, **make.arguments).out
    leaves = {name: x for name, x in (("q", make.q), ("k", make.k), ("v", make.v)) if x.requires_grad}
    if not leaves or not out.requires_grad:
        return out.detach(), {}
    grads = torch.autograd.grad(out.float().sum(), list(leaves.values()), allow_unused=True)
    return out.detach(), {name: grad for name, grad in zip(leaves, grads) if grad is not None}


def through_a_cache(call: Drawn, make: Made) -> Tensor:
    """The same call, decoded: n = m, causal, a first half and a second half."""
    if call.n != call.m or call.mask not in ("none", "causal") or call.bias != "none" or "performer" in call.spec:
        return attend(make.q, make.k, make.v, make.spec, **make.arguments).out
    cache = KVCache.allocate(call.b, call.g, max(call.n, 1), call.d, value_dim=call.e, dtype=make.k.dtype)
    make.arguments["mask"] = Mask.causal()
    half, outs = call.n // 2, []
    for part in (slice(0, half), slice(half, call.n)):
        arguments = dict(make.arguments)
        given = arguments.get("temperatures")
        if given is not None:
            held = (given.query, given.key, given.value)
            arguments["temperatures"] = Temperatures(*(cut(t, part) for t in held))
        with torch.no_grad():
            pieces = (make.q[:, :, part], make.k[:, :, part], make.v[:, :, part])
            outs.append(attend(*pieces, make.spec, state=cache, **arguments).out)
    return torch.cat(outs, dim=2)


def cut(temperature: Tensor | None, part: slice) -> Tensor | None:
    return temperature if temperature is None or temperature.shape[2] == 1 else temperature[:, :, part]


@torch.no_grad()
def exact(call: Drawn, make: Made) -> Tensor:
    """The float64 reference on the same numbers."""
    arguments = {**make.arguments, "backend": "reference", "want": ()}
    given, bias = arguments.get("temperatures"), arguments.get("bias")
    q, k, v = (x.detach() for x in (make.q, make.k, make.v))
    spec = make.spec
    if given is not None:  # rounded to the dtype where the call rounds them
        q, k, v = selective(
            q, k, v, query_temperature=given.query, key_temperature=given.key, value_temperature=given.value
        )
        parsed = AttentionSpec.parse(spec) if isinstance(spec, str) else spec
        spec, arguments["temperatures"] = replace(parsed, temperature=None), None
    if isinstance(bias, DenseBias):
        arguments["bias"] = DenseBias(bias.values.double())
    elif isinstance(bias, ALiBi):
        arguments["bias"] = ALiBi(bias.slopes.double())
    return attend(q.double(), k.double(), v.double(), spec, **arguments).out
