"""`AttentionSpec`: an attention as four independent choices, with a text form that is safe in a shell.

    spec  = term ("+" term)*            laser+selective      self_adjust:form=product+window:256
    term  = name [":" value | ":" key=value ("," key=value)*]

Each choice is one small frozen dataclass, registered under its name: *weights* (scores to weights), *read* (weights and
values to output), *pattern* (which keys a query may see), *temperature* (a scale before the scores, whose tensors come
with the call). `check_product` holds the one table of products that mean nothing, each with its reason.

This file does not import torch: the command line reads specs before any tensor exists.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

from clearhead.attention.plugins import load_plugins
from clearhead.errors import UserError, nearest


@dataclass(frozen=True)
class Choice:
    """Base of every choice; `kind` says which of the four it is, `name` how it is written."""

    kind: ClassVar[str]
    name: ClassVar[str]

    def __str__(self) -> str:
        fields = dataclasses.fields(self)
        changed = [f for f in fields if getattr(self, f.name) != f.default]
        if not changed:
            return self.name
        if len(fields) == 1:
            return f"{self.name}:{_print_value(getattr(self, fields[0].name))}"
        return self.name + ":" + ",".join(f"{f.name}={_print_value(getattr(self, f.name))}" for f in changed)


@dataclass(frozen=True)
class Weights(Choice):
    """How a row of scores becomes a row of weights. `rows_sum_to_one` decides whether LASER may read with them."""

    kind = "weights"
    rows_sum_to_one: ClassVar[bool] = False

    def equivalent_keys(self, seen: float) -> float:
        """For a query that sees so many keys: how many keys of dense attention cost as many operations."""
        return seen


@dataclass(frozen=True)
class Read(Choice):
    """How weights read values."""

    kind = "read"


@dataclass(frozen=True)
class Pattern(Choice):
    """Which keys a query may see, as part of the model (masks of a call are arguments, never part of the spec)."""

    kind = "pattern"

    def within(self, mask: Any, heads: int, m: int) -> Any:
        """Return the call's `Mask` (`attention/mask.py`) with this pattern, for so many query heads and keys."""
        return mask

    def mean_keys(self, context: int, *, causal: bool) -> float:
        """Keys that a query sees, averaged over `context` positions. Causal: (context + 1) / 2."""
        return (context + 1) / 2 if causal else float(context)


@dataclass(frozen=True)
class Temperature(Choice):
    """An inverse temperature on queries, keys or values before the scores; its tensors are given at the call."""

    kind = "temperature"


KINDS = ("weights", "read", "pattern", "temperature")
REGISTRY: dict[str, type[Choice]] = {}
C = TypeVar("C", bound=type[Choice])


def register(name: str) -> Callable[[C], C]:
    """Class decorator: make a choice known to the grammar under `name`."""

    def add(cls: C) -> C:
        if name in REGISTRY:
            raise ValueError(f"the attention term {name!r} is registered already, by {REGISTRY[name].__qualname__}")
        cls.name = name
        REGISTRY[name] = cls
        return cls

    return add


@register("softmax")
@dataclass(frozen=True)
class Softmax(Weights):
    """s = softmax(x) over the visible keys."""

    rows_sum_to_one: ClassVar[bool] = True


@register("self_adjust")
@dataclass(frozen=True)
class SelfAdjust(Weights):
    """Self-Adjust Softmax (arXiv 2502.18277): r(x) * softmax(x), with r by `form`; see `attention/self_adjust.py`.

    `detach_extrema=False` lets the gradient flow through the row's minimum and maximum (the formula as written, and the
    co-author's code). With `form="range"` and a positive top score that gradient vanishes as softmax's does;
    `detach_extrema=True` keeps it alive.
    """

    form: str = "range"
    detach_extrema: bool = False

    FORMS: ClassVar[tuple[str, ...]] = ("product", "min_shift", "minmax", "range")

    def __post_init__(self) -> None:
        if self.form not in self.FORMS:
            hint = nearest(self.form, self.FORMS)
            raise UserError(f"self_adjust: unknown form {self.form!r}{hint}; forms: {', '.join(self.FORMS)}")


@register("performer")
@dataclass(frozen=True)
class Performer(Weights):
    """FAVOR+ (arXiv 2009.14794): weights phi(q).phi(k) / sum, linear in length; see `attention/performer.py`.

    `features` counts random projections (hyperbolic and trigonometric make two features of each). A layer draws new
    ones every `redraw` training forwards (0 = never), from `seed`.
    """

    kernel: str = "softmax"
    features: int = 256
    redraw: int = 1000
    seed: int = 0

    KERNELS: ClassVar[tuple[str, ...]] = ("softmax", "hyperbolic", "regularized", "trigonometric", "relu")

    def __post_init__(self) -> None:
        if self.kernel not in self.KERNELS:
            hint = nearest(self.kernel, self.KERNELS)
            raise UserError(f"performer: unknown kernel {self.kernel!r}{hint}; kernels: {', '.join(self.KERNELS)}")
        for name, low in (("features", 1), ("redraw", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise UserError(f"performer: expected {name} of at least {low}, got {value!r}")

    @property
    def rows_sum_to_one(self) -> bool:  # type: ignore[override]
        """Whether weights are positive and sum to 1: with every kernel but the trigonometric one."""
        return self.kernel != "trigonometric"

    @property
    def width(self) -> int:
        """Features that a key leaves behind."""
        return self.features * (2 if self.kernel in ("hyperbolic", "trigonometric") else 1)

    def equivalent_keys(self, seen: float) -> float:
        """Per head: projecting q and k costs 4 m d, adding to and reading the sums 4 r d; a visible key costs 4 d."""
        return float(self.features + self.width)


@register("mean")
@dataclass(frozen=True)
class Mean(Read):
    """O = A V."""


@register("laser")
@dataclass(frozen=True)
class Laser(Read):
    """LASER (arXiv 2411.03493): O = log(A exp(V)), elementwise log and exp; see `attention/laser.py`."""


@register("full")
@dataclass(frozen=True)
class Full(Pattern):
    """Every key that the call's mask allows."""


@register("window")
@dataclass(frozen=True)
class Window(Pattern):
    """A sliding window: causal, `size` keys including the query's own; bidirectional, (size - 1) // 2 on each side."""

    size: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise UserError(f"window: expected a size of at least 1, got {self.size!r}; write it as window:256")

    def within(self, mask: Any, heads: int, m: int) -> Any:
        """See `Pattern.within`."""
        from clearhead.attention.mask import Band, Mask

        side = (self.size - 1) // 2
        band = Band(self.size - 1, 0) if mask.is_causal else Band(side, side)
        return Mask((*mask.terms, band), mask.offset)

    def mean_keys(self, context: int, *, causal: bool) -> float:
        """With context c, causal: (w (w + 1) / 2 + (c - w) w) / c; both ways, with s keys on each side of the own one:
        1 + 2 (s (s + 1) / 2 + (c - 1 - s) s) / c.
        """
        if causal:
            window = min(self.size, context)
            return (window * (window + 1) / 2 + (context - window) * window) / context
        side = min((self.size - 1) // 2, context - 1)
        return 1 + 2 * (side * (side + 1) / 2 + (context - 1 - side) * side) / context


@register("bigbird")
@dataclass(frozen=True)
class BigBird(Pattern):
    """BigBird (arXiv 2007.14062): global, window and random blocks of keys; `attention/bigbird.py` says exactly which.

    `global_tokens` are tokens before the first block that see and are seen by all (ETC's extra tokens, or an ITC set
    that fills no block). `plan="released"` draws random blocks from the first 1,024 tokens only.
    """

    block_size: int = 64
    global_blocks: int = 2
    window_blocks: int = 3
    random_blocks: int = 3
    seed: int = 0
    global_tokens: int = 0
    plan: str = "uniform"

    PLANS: ClassVar[tuple[str, ...]] = ("uniform", "released")

    def __post_init__(self) -> None:
        if self.plan not in self.PLANS:
            raise UserError(
                f"bigbird: unknown plan {self.plan!r}{nearest(self.plan, self.PLANS)}; plans: uniform, released"
            )
        least = {
            "block_size": 1,
            "window_blocks": 1,
            "global_blocks": 0,
            "random_blocks": 0,
            "global_tokens": 0,
            "seed": 0,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise UserError(f"bigbird: expected {name} of at least {low}, got {value!r}")
        if self.window_blocks % 2 == 0:
            raise UserError(f"bigbird: expected an odd number of window_blocks, got {self.window_blocks}")

    def within(self, mask: Any, heads: int, m: int) -> Any:
        """See `Pattern.within`."""
        from clearhead.attention.blocks import Blocks
        from clearhead.attention.mask import Mask

        return Mask((*mask.terms, Blocks.over(self.layout(mask.is_causal), mask.terms, heads, m)), mask.offset)

    def layout(self, causal: bool) -> Any:
        """The pattern as a `BlockLayout` (`attention/bigbird.py`)."""
        from clearhead.attention.bigbird import BlockLayout

        return BlockLayout(
            self.block_size, self.global_blocks, self.window_blocks, self.random_blocks, self.seed, self.global_tokens,
            self.plan == "released", causal,
        )  # fmt: skip

    def mean_keys(self, context: int, *, causal: bool) -> float:
        """Counted row by row of blocks."""
        from clearhead.attention.bigbird import mean_keys

        return mean_keys(self.layout(causal), context)


@register("selective")
@dataclass(frozen=True)
class Selective(Temperature):
    """Selective Self-Attention (arXiv 2411.12892): a temperature per token for queries and values."""


@register("learned")
@dataclass(frozen=True)
class Learned(Temperature):
    """The control: one learned scalar per head on the queries, the same for every token."""


@dataclass(frozen=True)
class ProductRule:
    """One kind of product that means nothing, with the reason that the error quotes."""

    applies: Callable[[AttentionSpec], bool]
    reason: str


INVALID_PRODUCTS: tuple[ProductRule, ...] = (
    ProductRule(
        lambda s: isinstance(s.read, Laser) and not s.weights.rows_sum_to_one,
        "LASER reads log(A exp V), which needs weights that sum to 1 in each row; the rows of {weights} do not, so a "
        "shift of the values would change the result (drop laser, or use softmax weights)",
    ),
    ProductRule(
        lambda s: isinstance(s.weights, Performer) and not isinstance(s.pattern, Full),
        "{weights} sums over features and never makes a score, so it cannot leave out keys by a pattern (drop the "
        "pattern, or use softmax weights with it)",
    ),
    ProductRule(
        lambda s: isinstance(s.weights, Performer) and isinstance(s.temperature, Learned),
        "a scale on the queries of {weights} does nothing to ReLU features and multiplies the variance of the others "
        "exponentially (use selective with temperature_on=value, or drop it)",
    ),
)


@dataclass(frozen=True)
class AttentionSpec:
    """A point of the algebra: weights x read x pattern x temperature. Hashable; `parse(str(spec)) == spec`.

    Raises `UserError` (a `ValueError`) for a product that means nothing, quoting why.
    """

    weights: Weights = Softmax()
    read: Read = Mean()
    pattern: Pattern = Full()
    temperature: Temperature | None = None
    # The printed form is made once, so that compiled code and operators need no string work per call.
    text: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", self._print())
        for rule in INVALID_PRODUCTS:
            if rule.applies(self):
                raise UserError(f"attention {self.text!r}: {rule.reason.format(weights=self.weights.name)}")

    def _print(self) -> str:
        terms: list[Choice] = []
        if self.weights != Softmax() or self.read == Mean():
            terms.append(self.weights)
        if self.read != Mean():
            terms.append(self.read)
        if self.pattern != Full():
            terms.append(self.pattern)
        if self.temperature is not None:
            terms.append(self.temperature)
        return "+".join(str(t) for t in terms)

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, text: str | AttentionSpec) -> AttentionSpec:
        """Read a spec from text; a spec is returned as it is."""
        if isinstance(text, AttentionSpec):
            return text
        if not isinstance(text, str):
            raise TypeError(f"attention: expected a string such as 'laser+selective' or an AttentionSpec, got {text!r}")
        return _parse(text)


@lru_cache(maxsize=256)
def _parse(text: str) -> AttentionSpec:
    chosen: dict[str, Choice] = {}
    for term in text.split("+"):
        choice = _parse_term(term.strip(), text)
        if choice.kind in chosen:
            raise UserError(
                f"attention {text!r}: two values for {choice.kind}, {chosen[choice.kind]} and {choice}; keep one"
            )
        chosen[choice.kind] = choice
    return AttentionSpec(**chosen)  # type: ignore[arg-type]


def _parse_term(term: str, whole: str) -> Choice:
    name, colon, rest = term.partition(":")
    if name not in REGISTRY:
        load_plugins()
    if name not in REGISTRY:
        if not name:
            raise UserError(f"attention {whole!r}: an empty term; write terms as name or name:value, joined by '+'")
        known = "; ".join(f"{kind}: {', '.join(n for n, c in REGISTRY.items() if c.kind == kind)}" for kind in KINDS)
        raise UserError(f"attention {whole!r}: unknown term {name!r}{nearest(name, REGISTRY)}; {known}")
    cls = REGISTRY[name]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not colon:
        return cls()
    if not fields:
        raise UserError(f"attention {whole!r}: {name} takes no value, got {rest!r}")
    values: dict[str, Any] = {}
    for part in rest.split(","):
        key, equals, value = part.partition("=")
        if not equals:  # a bare value belongs to the first field
            key, value = next(iter(fields)), part
        if key not in fields:
            raise UserError(
                f"attention {whole!r}: {name} has no option {key!r}{nearest(key, fields)}; options: {', '.join(fields)}"
            )
        if key in values:
            raise UserError(f"attention {whole!r}: {name} got {key} twice")
        values[key] = _parse_value(value, typing.get_type_hints(cls)[key], f"{name}:{key}")
    return cls(**values)


def _parse_value(text: str, wanted: Any, where: str) -> Any:
    if isinstance(wanted, types.UnionType):  # `int | None`
        if text == "none":
            return None
        wanted = next(t for t in typing.get_args(wanted) if t is not types.NoneType)
    if wanted is bool:
        if text in ("true", "false"):
            return text == "true"
        raise UserError(f"{where}: expected true or false, got {text!r}")
    if wanted in (int, float):
        try:
            return wanted(text)
        except ValueError:
            raise UserError(
                f"{where}: expected {'a whole number' if wanted is int else 'a number'}, got {text!r}"
            ) from None
    return text


def _print_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)
