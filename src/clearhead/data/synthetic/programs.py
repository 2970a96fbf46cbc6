"""Programs: statements over a few variables; say the value at the `;` of each print.

    x0 = 3 ; x0 ++ ; if x0 > 2 : print x0 ;        answer at the last `;`: 4

After the algorithmic task of the Feedback Transformer (arXiv 2002.09402): assign once, raise, lower, print, and any of
the last three behind a condition. Here values stop at 1 and at the largest, and a print behind a false condition is not
asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from clearhead.data.synthetic.task import Sample, Synthetic, numbered, unanswered

_WORDS = ("=", "++", "--", "if", "<", ">", ":", "print", ";", ".")
_KINDS = ("++", "--", "print", "if")


@dataclass(frozen=True)
class Programs(Synthetic):
    """Statements fill the sequence and a plain print ends it; what is left over is `.`"""

    variables: int = 3
    largest: int = 10
    """Values are 1 to this."""

    name: ClassVar[str] = "programs"
    chance: ClassVar[str] = "1 / largest, and more by the commonest value"

    @property
    def symbols(self) -> tuple[str, ...]:
        """See `Synthetic`."""
        return (*numbered("x", self.variables), *map(str, range(1, self.largest + 1)), *_WORDS)

    def check(self) -> None:
        """See `Synthetic`."""
        self.at_least("variables", 1)
        self.at_least("largest", 2)

    def least(self) -> int:
        """See `Synthetic`: an assignment and a print."""
        return 7

    def draw(self, random: np.random.Generator, length: int, both_ways: bool) -> Sample:
        """See `Synthetic`."""
        token = {symbol: i for i, symbol in enumerate(self.symbols)}
        program = _Program(self.largest)
        most = length // 3 + 1  # statements
        for variable, other, kind, inner, number in zip(
            *random.integers(self.variables, size=(2, most)).tolist(),
            random.choice(_KINDS, size=most).tolist(),
            random.choice(_KINDS[:-1], size=most).tolist(),
            random.integers(1, self.largest + 1, size=most).tolist(),
            strict=True,
        ):
            if not program.add(variable, other, kind, inner, number, length - 3):
                break
        program.add(int(random.choice(program.variables)), 0, "print", "", 0, length)
        words = program.words + ["."] * (length - len(program.words))
        sample = unanswered(np.asarray([token[word] for word in words], dtype=np.int64))
        for place, value, since in program.answers:
            sample.targets[place], sample.distance[place] = token[str(value)], place - since
        return sample


class _Program:
    """A program as it grows: its words, what its variables hold, and what its prints must answer."""

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.words: list[str] = []
        self.answers: list[tuple[int, int, int]] = []
        """Where it is asked, the value, and where that was decided."""
        self._holds: dict[int, tuple[int, int]] = {}  # variable -> value, where its last change ended

    @property
    def variables(self) -> list[int]:
        """Those that have a value."""
        return list(self._holds)

    def add(self, variable: int, other: int, kind: str, inner: str, number: int, length: int) -> bool:
        """Add a statement about `variable`, unless it goes beyond `length`; its first statement assigns `number`."""
        fresh = variable not in self._holds
        condition = "" if fresh or kind != "if" else "<" if number > self.largest // 2 else ">"
        asked = other if other in self._holds else variable
        kind = "=" if fresh else inner if condition else kind
        words = [f"x{variable}", "=", str(number), ";"] if fresh else [f"x{variable}", kind, ";"]
        words = ["print", f"x{variable}", ";"] if kind == "print" else words
        words = ["if", f"x{asked}", condition, str(number), ":", *words] if condition else words
        if len(self.words) + len(words) > length:
            return False
        self.words += words
        place = len(self.words) - 1
        if fresh:
            self._holds[variable] = number, place
            return True
        if condition and not (self._holds[asked][0] < number if condition == "<" else self._holds[asked][0] > number):
            return True
        value, since = self._holds[variable]
        if kind == "print":
            self.answers.append((place, value, since))
        else:
            changed = min(max(value + (1 if kind == "++" else -1), 1), self.largest)
            self._holds[variable] = changed, place
        return True
