"""The fixed alphabets of sequences: DNA by letters or by words of k letters, and proteins. Imports nothing heavy.

dna      A C G T N, one token a letter
dna3     every three letters a token (codons of one reading frame, 64), letters where that is not possible
dna6     every six letters a token (4,096)
protein  the 20 amino acids, then B Z X (ambiguous) and U O (selenocysteine, pyrrolysine)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Alphabet:
    """Letters, and how many of them a token holds; only the first `plain` letters make up longer words."""

    name: str
    letters: str
    word: int = 1
    plain: int = 0

    @property
    def words(self) -> int:
        """Tokens that are words of several letters; they come first."""
        return self.plain**self.word if self.word > 1 else 0

    @property
    def vocab_size(self) -> int:
        """Words, single letters and the separator."""
        return self.words + len(self.letters) + 1


ALPHABETS: dict[str, Alphabet] = {
    alphabet.name: alphabet
    for alphabet in (
        Alphabet("dna", "ACGTN"),
        Alphabet("dna3", "ACGTN", word=3, plain=4),
        Alphabet("dna6", "ACGTN", word=6, plain=4),
        Alphabet("protein", "ACDEFGHIKLMNPQRSTVWYBZXUO"),
    )
}
