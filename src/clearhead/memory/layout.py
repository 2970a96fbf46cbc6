"""`MemoryLayout`: how many past tokens each layer remembers, with a text form. Imports no torch.

    layout = place ("," option)*
    place  = full[:M] | first:n | last:n | interleaved:k | lengths:M1/M2/...
    option = long=M | short=M | range=memory|window

    full:512                        every layer remembers 512 tokens (Transformer-XL)
    last:1,long=96,short=4          the last layer 96, the layers below it 4
    interleaved:4                   4 long memories at equal spacing, the top layer among them
    lengths:4/4/96,range=window     each layer's own number, from the lowest layer

"Do Transformers Need Deep Long-Range Memory?" (arXiv 2007.03356) gives some layers a long memory and the others a short
one, and asks where the long ones belong. What a short memory means can be read in two ways, and both exist here:

- range=memory: only the memory is short. Within a segment a layer still sees every token before it.
- range=window: a query sees its own token and the M before it, in the segment and in the memory alike.

Interleaved places k of L layers at round((j+1) L/k) - 1, halves rounded up, so that the top layer has a long one.
"""

from __future__ import annotations

from dataclasses import dataclass

from clearhead.errors import UserError, nearest, unknown

PLACES = ("full", "first", "last", "interleaved", "lengths")
RANGES = ("memory", "window")
OPTIONS = ("long", "short", "range")


@dataclass(frozen=True)
class MemoryLayout:
    """Which layers have a long memory, and how long each is; hashable, `parse(str(layout)) == layout`.

    Raises `UserError` for what means nothing.
    """

    place: str = "full"
    """full | first | last | interleaved | lengths."""
    count: int | None = None
    """Of first, last and interleaved: layers with a long memory."""
    each: tuple[int, ...] = ()
    """Of lengths: tokens of every layer, the lowest first."""
    long: int | None = None
    """Tokens of a long memory; None = as many as a segment has, as Transformer-XL is trained."""
    short: int | None = None
    """Tokens of the other layers; None = an eighth of `long` (the paper's 128 for 1024)."""
    range: str = "memory"
    """memory | window."""

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise unknown("memory layout", self.place, PLACES)
        if self.range not in RANGES:
            raise unknown("memory range", self.range, RANGES)
        counts = self.place in ("first", "last", "interleaved")
        if counts != (self.count is not None):
            raise UserError(
                f"memory {self.place}: expected a number of layers, such as {self.place}:1"
                if counts
                else f"memory {self.place}: takes no number of layers"
            )
        if self.count is not None:
            _check(f"memory {self.place}", self.count)
        if (self.place == "lengths") != bool(self.each):
            raise UserError("memory lengths: expected a number for each layer, such as lengths:4/4/96")
        for length in self.each:
            _check("memory lengths", length)
        if self.place == "lengths" and (self.long is not None or self.short is not None):
            raise UserError("memory lengths: says every layer's length itself; leave out long and short")
        if self.place == "full" and self.short is not None:
            raise UserError("memory full: no layer is short; leave out short")
        for name in ("long", "short"):
            if getattr(self, name) is not None:
                _check(f"memory {name}", getattr(self, name))

    @classmethod
    def parse(cls, text: str | MemoryLayout) -> MemoryLayout:
        """Read a layout from text; a layout is returned as it is."""
        if isinstance(text, MemoryLayout):
            return text
        if not isinstance(text, str):
            raise TypeError(
                f"memory: expected a string such as 'last:1,long=96,short=4' or a MemoryLayout, got {text!r}"
            )
        head, *options = (part.strip() for part in text.split(","))
        place, colon, value = head.partition(":")
        if place not in PLACES:
            raise UserError(
                f"memory {text!r}: unknown layout {place!r}{nearest(place, PLACES)}; write one of full:M, first:n, "
                f"last:n, interleaved:k, lengths:M1/M2/..., then options such as long=512,short=64,range=window"
            )
        given: dict[str, object] = {"place": place}
        if place == "lengths":
            given["each"] = tuple(_number(text, "lengths", part) for part in value.split("/"))
        elif place == "full":
            given |= {"long": _number(text, "full", value)} if colon else {}
        else:
            given["count"] = _number(text, place, value)
        for option in options:
            name, equals, word = option.partition("=")
            if name not in OPTIONS or not equals:
                raise UserError(f"memory {text!r}: unknown option {option!r}; options: long=M, short=M, range=window")
            if name in given:
                raise UserError(f"memory {text!r}: {name} is given twice")
            given[name] = word if name == "range" else _number(text, name, word)
        return cls(**given)  # type: ignore[arg-type]

    def __str__(self) -> str:
        head = self.place
        if self.count is not None:
            head += f":{self.count}"
        if self.each:
            head += ":" + "/".join(map(str, self.each))
        if self.place == "full" and self.long is not None:
            head += f":{self.long}"
        words = [head]
        if self.place != "full" and self.long is not None:
            words.append(f"long={self.long}")
        if self.short is not None:
            words.append(f"short={self.short}")
        if self.range != "memory":
            words.append(f"range={self.range}")
        return ",".join(words)

    @property
    def windowed(self) -> bool:
        """Whether a layer's length bounds what it sees in its own segment too."""
        return self.range == "window"

    def lengths(self, layers: int, segment: int) -> tuple[int, ...]:
        """Tokens that each of `layers` remembers, the lowest first; `segment` tokens are read at a time.

        Raises `UserError` when the layout does not fit so many layers.
        """
        if self.each:
            if len(self.each) != layers:
                raise UserError(
                    f"memory {self}: has {len(self.each)} lengths, the model {layers} layers; give one each"
                )
            return self.each
        long = segment if self.long is None else self.long
        short = long // 8 if self.short is None else self.short
        if self.place == "full":
            return (long,) * layers
        assert self.count is not None
        if self.count > layers:
            raise UserError(f"memory {self}: {self.count} long memories, but the model has {layers} layers")
        return tuple(long if layer in self._long_layers(layers) else short for layer in range(layers))

    def _long_layers(self, layers: int) -> set[int]:
        assert self.count is not None
        k = self.count
        if self.place == "first":
            return set(range(k))
        if self.place == "last":
            return set(range(layers - k, layers))
        return {(2 * (j + 1) * layers + k) // (2 * k) - 1 for j in range(k)}


def memory_bytes(lengths: tuple[int, ...], *, batch: int, width: int, element_size: int) -> int:
    """Bytes of a full memory: batch * width * element_size * (sum of the layers' lengths)."""
    return batch * width * element_size * sum(lengths)


def _check(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{name}: expected a whole number of at least 0, got {value!r}")


def _number(text: str, name: str, word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise UserError(f"memory {text!r}: {name}: expected a whole number, got {word!r}") from None
