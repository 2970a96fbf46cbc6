"""What the contract suite runs over: every spec of the grammar, mask kinds, biases, inputs. Needs only torch.

Legend: b batch, h query heads, g key/value heads, n queries, m keys, d head dim of queries and keys, e of values.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import typing
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clearhead.attention.backends import BACKENDS
from clearhead.attention.bias import ALiBi, Bias, DenseBias
from clearhead.attention.bigbird import BlockLayout
from clearhead.attention.fire import FireBias
from clearhead.attention.kerple import KerpleBias
from clearhead.attention.mask import Mask
from clearhead.attention.selective import Temperatures
from clearhead.attention.spec import (
    KINDS,
    REGISTRY,
    AttentionSpec,
    BigBird,
    Choice,
    Learned,
    Performer,
    SelfAdjust,
    Window,
)
from clearhead.attention.t5 import T5Bias
from clearhead.errors import UserError

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKEND_NAMES = tuple(BACKENDS)

# ---- every spec ------------------------------------------------------------------------------------------------------

WINDOW = 40  # bites at 63 keys, where SDPA still serves; at 128 and 200 SDPA refuses
# Values for choices whose numbers have no default, or one that hides nothing at these lengths.
EXAMPLES: dict[str, list[dict[str, object]]] = {
    "window": [{"size": WINDOW}],
    "bigbird": [{"block_size": 8, "random_blocks": 2}],
    # The other two kernels share softmax's map, with other rows.
    "performer": [{"kernel": kernel, "features": 16} for kernel in ("softmax", "relu", "trigonometric")],
}


def choices_of(kind: str) -> list[Choice]:
    """Every choice of a kind: all truth values, all names of a field `x` that has a class attribute `XS`."""
    found: list[Choice] = []
    for name, cls in REGISTRY.items():
        if cls.kind != kind:
            continue
        if name in EXAMPLES:
            found += [cls(**values) for values in EXAMPLES[name]]
            continue
        hints = typing.get_type_hints(cls)
        options = []
        for f in dataclasses.fields(cls):
            names = getattr(cls, f.name.upper() + "S", None)
            options.append((False, True) if hints[f.name] is bool else names or (f.default,))
        keys = [f.name for f in dataclasses.fields(cls)]
        found += [cls(**dict(zip(keys, values))) for values in itertools.product(*options)]
    return found


def products() -> tuple[list[AttentionSpec], dict[str, str]]:
    """All valid specs, and the refused products with the error's own words."""
    valid, refused = [], {}
    kinds = [choices_of(kind) + ([None] if kind == "temperature" else []) for kind in KINDS]
    for chosen in itertools.product(*kinds):
        try:
            valid.append(AttentionSpec(*chosen))
        except UserError as error:
            refused["+".join(str(c) for c in chosen if c is not None)] = str(error)
    return sorted(valid, key=lambda s: (len(s.text), s.text)), refused


SPECS, REFUSED_PRODUCTS = products()
PLAIN = [s for s in SPECS if s.pattern.name == "full" and s.temperature is None]  # one for each weights x read


# ---- one case --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One attention call, without its dtype and backend."""

    spec: AttentionSpec
    mask: str = "none"
    bias: str = "none"
    n: int = 63
    m: int = 63
    d: int = 32
    e: int = 32
    b: int = 2
    h: int = 2
    g: int = 2

    def __str__(self) -> str:
        return f"{self.mask}-{self.bias}-{self.n}x{self.m}-d{self.d}e{self.e}-h{self.h}g{self.g}"


class Layout:
    """The raw numbers behind the masks of a case, as plain Python where `by_hand` reads them."""

    def __init__(self, case: Case) -> None:
        self.b, self.h, self.n, self.m = case.b, case.h, case.n, case.m
        generator = _generator(case, "layout")
        third = max(1, self.m // 3)
        self.ends = [self.m if i % 2 == 0 else 2 * third if self.m > 1 else 0 for i in range(self.b)]
        self.starts = [0 if i % 2 == 0 else third for i in range(self.b)]
        self.key_segments = [self._segments(self.m, i) for i in range(self.b)]
        self.query_segments = [row[-self.n :] if self.n <= self.m else self._segments(self.n, i)
                               for i, row in enumerate(self.key_segments)]  # fmt: skip
        self.dense = torch.rand(self.b, self.h, self.n, self.m, generator=generator) < 0.7
        self.dense[0, :, :1] = False  # one query that sees nothing
        self.dense_keys = torch.rand(self.b, 1, 1, self.m, generator=generator) < 0.7
        self.offsets = [self.m - self.n - i for i in range(self.b)]

    def _segments(self, length: int, row: int) -> list[int]:
        cuts = (length * 2 // 5, length * 3 // 4, length - length // 8 * (row % 2))
        return [-1 if t >= cuts[2] else sum(t >= c for c in cuts[:2]) for t in range(length)]


Sees = Callable[[Layout, int, int, int, int], bool]  # (layout, batch row, head, query position, key) -> visible


@dataclass(frozen=True)
class MaskKind:
    """How the package is told a mask, and the same rule in plain Python."""

    make: Callable[[Layout, torch.device], Mask]
    sees: Sees
    causal: bool = False
    offset: Callable[[Layout, int], int] | None = None  # None: bottom-right, m - n
    square: bool = False  # needs n = m


def _long(values: list[int] | list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def _end_offset(layout: Layout, row: int) -> int:
    """With key lengths and n != m the queries are the last valid tokens of a row."""
    return layout.ends[row] - layout.n if layout.n != layout.m else 0


WIDTH = 8  # of the window masks
MASKS: dict[str, MaskKind] = {
    "none": MaskKind(lambda x, dev: Mask(), lambda x, b, h, p, j: True),
    "causal": MaskKind(lambda x, dev: Mask.causal(), lambda x, b, h, p, j: j <= p, causal=True),
    "offset": MaskKind(
        lambda x, dev: Mask.causal(_long(x.offsets, dev)),
        lambda x, b, h, p, j: j <= p, causal=True, offset=lambda x, b: x.offsets[b],
    ),
    "prefix": MaskKind(lambda x, dev: Mask.causal(prefix=5), lambda x, b, h, p, j: j <= p or j < 5, causal=True),
    "window": MaskKind(lambda x, dev: Mask.window(WIDTH), lambda x, b, h, p, j: 0 <= p - j < WIDTH, causal=True),
    "window_both": MaskKind(
        lambda x, dev: Mask.window(WIDTH, causal=False), lambda x, b, h, p, j: abs(p - j) <= (WIDTH - 1) // 2
    ),
    "right": MaskKind(
        lambda x, dev: Mask.key_lengths(_long(x.ends, dev)), lambda x, b, h, p, j: j < x.ends[b], offset=_end_offset
    ),
    "left": MaskKind(
        lambda x, dev: Mask.key_range(_long(x.starts, dev), None), lambda x, b, h, p, j: j >= x.starts[b]
    ),
    "causal_right": MaskKind(
        lambda x, dev: Mask.causal() & Mask.key_lengths(_long(x.ends, dev)),
        lambda x, b, h, p, j: j <= p and j < x.ends[b], causal=True, offset=_end_offset,
    ),
    "causal_left": MaskKind(
        lambda x, dev: Mask.key_range(_long(x.starts, dev), None) & Mask.causal(),
        lambda x, b, h, p, j: x.starts[b] <= j <= p, causal=True,
    ),
    "both_sides": MaskKind(
        lambda x, dev: Mask.key_range(_long(x.starts, dev), _long([x.m - 1] * x.b, dev)),
        lambda x, b, h, p, j: x.starts[b] <= j < x.m - 1,
        offset=lambda x, b: x.m - 1 - x.n if x.n != x.m else 0,
    ),
    "segments": MaskKind(
        lambda x, dev: Mask.segments(_long(x.query_segments, dev), _long(x.key_segments, dev)),
        lambda x, b, h, p, j: _same_segment(x, b, p, j), square=True,
    ),
    "causal_segments": MaskKind(
        lambda x, dev: Mask.causal() & Mask.segments(_long(x.key_segments, dev)),
        lambda x, b, h, p, j: j <= p and _same_segment(x, b, p, j), causal=True, square=True,
    ),
    "dense": MaskKind(
        lambda x, dev: Mask.dense(x.dense.to(dev)), lambda x, b, h, p, j: bool(x.dense[b, h, p - (x.m - x.n), j])
    ),
    "dense_keys": MaskKind(
        lambda x, dev: Mask.dense(x.dense_keys.to(dev)), lambda x, b, h, p, j: bool(x.dense_keys[b, 0, 0, j])
    ),
    "all_of_them": MaskKind(
        lambda x, dev: Mask.window(WIDTH) & Mask.key_range(_long(x.starts, dev), None)
        & Mask.dense(x.dense_keys.to(dev)) & Mask.segments(_long(x.key_segments, dev)),
        lambda x, b, h, p, j: 0 <= p - j < WIDTH and j >= x.starts[b] and bool(x.dense_keys[b, 0, 0, j])
        and _same_segment(x, b, p, j), causal=True, square=True,
    ),
}  # fmt: skip


def _same_segment(x: Layout, b: int, p: int, j: int) -> bool:
    return x.key_segments[b][p] == x.key_segments[b][j] >= 0


def in_pattern(spec: AttentionSpec, mask: str, layout: Layout, b: int, h: int, p: int, j: int) -> bool:
    """The spec's own pattern in plain Python."""
    causal = MASKS[mask].causal
    if isinstance(spec.pattern, BigBird):
        return in_blocks(spec.pattern, causal, document(mask, layout, b, p), h, p, j)
    if not isinstance(spec.pattern, Window):
        return True
    size = spec.pattern.size
    return 0 <= p - j < size if causal else abs(p - j) <= (size - 1) // 2


def document(mask: str, layout: Layout, b: int, p: int) -> tuple[int, int]:
    """Where the document of position p begins and ends."""
    start, end = 0, layout.m
    p = min(max(p, 0), layout.m - 1)
    if mask in ("left", "causal_left", "both_sides", "all_of_them"):
        start = layout.starts[b]
    if mask in ("right", "causal_right", "both_sides"):
        end = layout.m - 1 if mask == "both_sides" else layout.ends[b]
    if mask in ("segments", "causal_segments", "all_of_them"):
        same = [k for k, s in enumerate(layout.key_segments[b]) if s == layout.key_segments[b][p]]
        start, end = max(start, same[0]), min(end, same[-1] + 1)
    return start, layout.m if MASKS[mask].causal else end


def in_blocks(x: BigBird, causal: bool, place: tuple[int, int], h: int, p: int, j: int) -> bool:
    """Whether the block of position p sees that of key j; the drawn blocks are taken as they are."""
    start, end = place[0] + x.global_tokens, place[1]
    first, last = (x.global_blocks, 0) if causal else ((x.global_blocks + 1) // 2, x.global_blocks // 2)
    before, after = (x.window_blocks - 1, 0) if causal else ((x.window_blocks - 1) // 2,) * 2
    blocks = max(math.ceil((end - start) / x.block_size), 1)
    row, column = min((p - start) // x.block_size, blocks - 1), (j - start) // x.block_size
    if column < first or column >= blocks - last or -before <= column - row <= after:
        return True
    if j < start or (not causal and (p < start or row < first or row >= blocks - last)):
        return True
    layout = BlockLayout(
        x.block_size, x.global_blocks, x.window_blocks, x.random_blocks, x.seed, x.global_tokens,
        x.plan == "released", causal,
    )  # fmt: skip
    return row >= 0 and column in layout.random_blocks(range(h, h + 1), blocks)[0, row]


@functools.lru_cache(maxsize=64)
def _sees(mask: str, spec: AttentionSpec, b: int, h: int, n: int, m: int, shown: Case) -> Tensor:
    kind, layout, offset = MASKS[mask], Layout(shown), offsets_by_hand(shown)
    heads = h if mask == "dense" or isinstance(spec.pattern, BigBird) else 1
    seen = torch.zeros(b, heads, n, m, dtype=torch.bool)
    for row, head, i in itertools.product(range(b), range(heads), range(n)):
        p = i + offset[row]
        for j in range(m):
            seen[row, head, i, j] = kind.sees(layout, row, head, p, j) and in_pattern(
                spec, mask, layout, row, head, p, j
            )
    return seen.expand(b, h, n, m)


def offsets_by_hand(case: Case) -> list[int]:
    """The position of the first query among the keys, for each batch row."""
    kind, layout = MASKS[case.mask], Layout(case)
    return [case.m - case.n if kind.offset is None else kind.offset(layout, row) for row in range(case.b)]


def sees_by_hand(case: Case) -> Tensor:
    """[b, h, n, m] bool on the CPU: who sees whom, from the plain rules alone."""
    plain = AttentionSpec(pattern=case.spec.pattern)
    return _sees(case.mask, plain, case.b, case.h, case.n, case.m, dataclasses.replace(case, spec=plain)).clone()


def _kerple(c: Case, gen: torch.Generator) -> list[Tensor]:
    return [0.2 + torch.rand(c.h, generator=gen) for _ in range(2)]


def _fire(c: Case, gen: torch.Generator) -> list[Tensor]:
    """Six hidden units; distances are stretched from place 11.5 on, so that most lengths meet both sides of it."""
    shapes = ((6,), (6,), (c.h, 6), (c.h,))
    drawn = [torch.randn(shape, generator=gen) for shape in shapes]
    return [*drawn, torch.tensor([0.375]), torch.tensor([11.5])]


T5_DISTANCE = 20
# How a bias is made of its tensors, and these.
BIASES: dict[str, Callable[[Case, torch.Generator], tuple[Callable[..., Bias], list[Tensor]] | None]] = {
    "none": lambda c, gen: None,
    "alibi": lambda c, gen: (ALiBi, [ALiBi.default_slopes(c.h)]),
    "dense": lambda c, gen: (DenseBias, [torch.randn(c.b, c.h, c.n, c.m, generator=gen)]),
    "dense_keys": lambda c, gen: (DenseBias, [torch.randn(1, c.h, 1, c.m, generator=gen)]),
    "dense_batch": lambda c, gen: (DenseBias, [torch.randn(c.b, 1, c.n, c.m, generator=gen)]),
    "t5": lambda c, gen: (
        functools.partial(T5Bias, max_distance=T5_DISTANCE, bidirectional=True), [torch.randn(c.h, 8, generator=gen)]
    ),
    "kerple": lambda c, gen: (KerpleBias, _kerple(c, gen)),
    "kerple_power": lambda c, gen: (functools.partial(KerpleBias, form="power"), _kerple(c, gen)),
    "fire": lambda c, gen: (FireBias, _fire(c, gen)),
}  # fmt: skip


# ---- inputs and runs -------------------------------------------------------------------------------------------------


def _generator(case: Case, salt: str) -> torch.Generator:
    # The numbers depend on shapes, mask and bias only, so that specs meet the same inputs.
    return torch.Generator().manual_seed(zlib.crc32(f"{case} {salt}".encode()))


def _exact(x: Tensor) -> Tensor:
    """Round to bf16 and keep away from fp16's subnormals: the same numbers in every dtype, so one truth serves all."""
    return x.sign() * x.abs().clamp_min(2.0**-7).bfloat16().double()


@dataclass
class Inputs:
    """Leaf tensors of a call by name (q, k, v, and where the case has them tau_q, tau_k, tau_v, bias_0, bias_1, ...),
    and d out."""

    case: Case
    tensors: dict[str, Tensor]
    d_out: Tensor
    make_bias: Callable[..., Bias] | None = None
    mask: Mask = field(default_factory=Mask)

    def bias(self) -> Bias | None:
        if self.make_bias is None:
            return None
        return self.make_bias(*(x for name, x in self.tensors.items() if name.startswith("bias")))

    def temperatures(self) -> Temperatures | None:
        if self.case.spec.temperature is None:
            return None
        return Temperatures(*(self.tensors.get(name) for name in ("tau_q", "tau_k", "tau_v")))

    def arguments(self) -> dict[str, object]:
        """Keyword arguments of `attend`."""
        return {"mask": self.mask, "bias": self.bias(), "temperatures": self.temperatures()}


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, *, grad: bool = True) -> Inputs:
    """The case's numbers in a dtype. Temperatures and biases are at least fp32, as a layer gives them."""
    c, gen = case, _generator(case, "inputs")
    layout = Layout(case)
    raw = {
        "q": torch.randn(c.b, c.h, c.n, c.d, generator=gen),
        "k": torch.randn(c.b, c.g, c.m, c.d, generator=gen),
        "v": torch.randn(c.b, c.g, c.m, c.e, generator=gen),
    }
    d_out = _exact(torch.randn(c.b, c.h, c.n, c.e, generator=gen))
    wide = torch.promote_types(dtype, torch.float32)
    if isinstance(c.spec.temperature, Learned):
        raw["tau_q"] = 0.5 + torch.rand(1, c.h, 1, 1, generator=gen)
    elif c.spec.temperature is not None and isinstance(c.spec.weights, Performer):
        raw["tau_v"] = 0.5 + torch.rand(c.b, c.g, c.m, 1, generator=gen)  # the only one that it takes
    elif c.spec.temperature is not None:
        raw["tau_q"] = 0.5 + torch.rand(c.b, c.h, c.n, 1, generator=gen)
        raw["tau_k"] = 0.5 + torch.rand(c.b, c.g, c.m, generator=gen)
        raw["tau_v"] = 0.5 + torch.rand(c.b, c.g, c.m, 1, generator=gen)
    name, _, fixed = c.bias.partition(":")
    made = BIASES[name](c, gen)
    if made is not None:
        raw |= {f"bias_{i}": x for i, x in enumerate(made[1])}
    tensors = {}
    for key, x in raw.items():
        x = _exact(x).to(device, dtype if key in "qkv" else wide)
        tensors[key] = x.requires_grad_(grad and not (key.startswith("bias") and fixed))
    mask = MASKS[c.mask].make(layout, device)
    # `minmax` and `range` divide by the spread of a row's scores: a row of one or two keys may have next to none.
    if isinstance(c.spec.weights, SelfAdjust) and c.spec.weights.form in ("minmax", "range"):
        count = c.spec.pattern.within(mask, c.h, c.m).visible_count(c.n, c.m, device)
        d_out = d_out.to(device).masked_fill((count < 3).unsqueeze(-1), 0.0)
    return Inputs(case, tensors, d_out.to(device, dtype), None if made is None else made[0], mask)
