"""Copy: letters, a gap, and then the same letters again, or backwards.

    a2 a0 a1 . . | a2 a0          causal: at `|` a2, at the copied a2 the next one, a0, at that a1
    a2 a0 a1 . . | _ _ _          both ways: the blanks are asked, because a copy in sight would give itself away

The first half is random, so nothing there is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from clearhead.data.synthetic.task import Sample, Synthetic, numbered, unanswered


@dataclass(frozen=True)
class Copy(Synthetic):
    """The letters fill what the gap leaves of the sequence."""

    letters: int = 16
    """Different letters."""
    gap: int = 0
    """Tokens between the letters and the `|` (one more where the length asks for it)."""
    order: str = "same"
    """same | reverse."""

    name: ClassVar[str] = "copy"
    chance: ClassVar[str] = "1 / letters"

    @property
    def symbols(self) -> tuple[str, ...]:
        """See `Synthetic`."""
        return (*numbered("a", self.letters), ".", "|", "_")

    def check(self) -> None:
        """See `Synthetic`."""
        self.at_least("letters", 2)
        self.at_least("gap", 0)
        self.one_of("order", ("same", "reverse"))

    def least(self) -> int:
        """See `Synthetic`: one letter."""
        return self.gap + 3

    def draw(self, random: np.random.Generator, length: int, both_ways: bool) -> Sample:
        """See `Synthetic`."""
        gap_token, bar, blank = (self.letters + i for i in range(3))
        count = (length - self.gap - both_ways) // 2
        letters = random.integers(self.letters, size=count)
        copied = letters if self.order == "same" else letters[::-1]
        sample = unanswered(np.full(length, gap_token, dtype=np.int64))
        sample.tokens[:count] = letters
        if both_ways:
            sample.tokens[-count:] = blank
            sample.tokens[-count - 1] = bar
        else:
            sample.tokens[-count] = bar
            sample.tokens[length - count + 1 :] = copied[:-1]
        sample.targets[-count:] = copied
        source = np.arange(count) if self.order == "same" else np.arange(count)[::-1]
        sample.distance[-count:] = np.arange(length - count, length) - source
        return sample
