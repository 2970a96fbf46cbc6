"""Scores of a translation model: nats per token, and chrF and BLEU of what it writes (by sacrebleu).

Legend: b pairs of a batch, s source tokens, t target tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from clearhead.data.pair_store import Encoded
from clearhead.data.pairs import PairData, pad_pairs
from clearhead.data.tokenizer import Tokenizer, Tokens
from clearhead.errors import UserError
from clearhead.models.beam import beam_search
from clearhead.models.seq2seq import Seq2Seq
from clearhead.train.evaluate import Interrupted

EXAMPLES = 8


@dataclass(frozen=True)
class Example:
    """A source, its reference and what the model wrote."""

    source: str
    reference: str
    translation: str


@dataclass(frozen=True)
class TranslationResult:
    """The score of a split; every target token weighs alike, the end of a target included."""

    split: str
    pairs: int
    tokens: int
    nats: float
    left_out: int
    """Pairs of the split that are longer than the context."""
    beams: int | None = None
    """None = nothing was translated, and what follows is empty."""
    chrf: float | None = None
    """chrF2, 0 to 100."""
    bleu: float | None = None
    """Corpus BLEU, 0 to 100."""
    chrf_signature: str = ""
    bleu_signature: str = ""
    examples: tuple[Example, ...] = ()
    translations: tuple[str, ...] = ()
    """Of all pairs, in reading order."""

    @property
    def nats_per_token(self) -> float:
        """Plain nats, without label smoothing."""
        return self.nats / self.tokens

    def metrics(self) -> dict[str, float]:
        """The numbers of the validation curve."""
        loss = self.nats_per_token
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; of the translations the examples only."""
        return {
            "split": self.split,
            "nats_per_token": self.nats_per_token,
            "pairs": self.pairs,
            "tokens": self.tokens,
            "left_out": self.left_out,
            "beams": self.beams,
            "chrf": self.chrf,
            "bleu": self.bleu,
            "chrf_signature": self.chrf_signature,
            "bleu_signature": self.bleu_signature,
            "examples": [vars(example) for example in self.examples],
        }


def require_sacrebleu() -> Any:
    """Return the package; `UserError` says how to get it."""
    try:
        import sacrebleu
    except ImportError:
        raise UserError(
            "translation is scored by sacrebleu, which is not installed; run: pip install 'clearhead[translation]'"
        ) from None
    return sacrebleu


def score_pairs(
    model: Seq2Seq | Any,
    data: PairData,
    split: str,
    *,
    max_tokens: int | None = None,
    batch_size: int = 32,
    beams: int | None = 1,
    length_penalty: float = 0.6,
    should_stop: Callable[[], bool] = lambda: False,
) -> TranslationResult:
    """Score the pairs of `split`, in the model's own dtype without autocast, sums in float64.

    Args:
        max_tokens: score pairs with about so many target tokens, spread over the split; None = all.
        beams: width of the search for translations (1 = greedy); None = do not translate.
        should_stop: asked before every batch.

    Raises `UserError` without sacrebleu, `Interrupted` when `should_stop` answers yes.
    """
    pairs = _spread(data.pairs(split), max_tokens)
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]), len(pairs[i][1]), i))
    device = next(model.parameters()).device
    separator = data.tokenizer.separator
    nats, tokens = 0.0, 0
    written = [""] * len(pairs)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            if should_stop():
                raise Interrupted
            rows = order[first : first + batch_size]
            batch_nats, batch_tokens = _nats(model, [pairs[i] for i in rows], separator, device)
            nats, tokens = nats + batch_nats, tokens + batch_tokens
            if beams is None:
                continue
            sources = [pairs[i][0] for i in rows]
            found = translate(
                model, data.tokenizer, sources, limit=data.config.context, beams=beams, length_penalty=length_penalty
            )
            for i, text in zip(rows, found, strict=True):
                written[i] = text
    finally:
        model.train(was_training)
    plain = TranslationResult(split, len(pairs), tokens, nats, data.left_out[split])  # type: ignore[index]
    return plain if beams is None else _judged(plain, data.tokenizer, pairs, written, beams)


def translate(
    model: Seq2Seq,
    tokenizer: Tokenizer,
    sources: Sequence[Tokens],
    *,
    limit: int,
    beams: int = 1,
    length_penalty: float = 0.6,
) -> list[str]:
    """Return the best translation of each source (tokens without separator) as text.

    A translation ends after at most three times as many tokens as the longest source has, and 16, and `limit`.
    """
    device = next(model.parameters()).device
    separator = tokenizer.separator
    padded = pad_pairs([(source, source[:0]) for source in sources], separator)
    whole = bool(padded.source_valid.all())
    found = beam_search(
        model,
        torch.from_numpy(padded.source).to(device),
        source_valid=None if whole else torch.from_numpy(padded.source_valid).to(device),
        start_token=separator,
        stop_token=separator,
        max_new_tokens=min(limit, 3 * padded.source.shape[1] + 16),
        beams=beams,
        length_penalty=length_penalty,
        vocabulary=tokenizer.vocab_size,
    )
    return [tokenizer.decode(hypotheses[0].tokens) for hypotheses in found]


@torch.no_grad()
def _nats(model: Any, pairs: list[Encoded], separator: int, device: torch.device) -> tuple[float, int]:
    batch = pad_pairs(pairs, separator)
    source, valid, tokens, targets = (
        torch.from_numpy(x).to(device) for x in (batch.source, batch.source_valid, batch.tokens, batch.targets)
    )
    with torch.autocast(device.type, enabled=False):
        logits_btV = model(source, tokens, source_valid=None if bool(batch.source_valid.all()) else valid)
        nats_bt = F.cross_entropy(logits_btV.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return float(nats_bt.cpu().double().sum()), int((targets >= 0).sum())


def _spread(pairs: list[Encoded], max_tokens: int | None) -> list[Encoded]:
    """All pairs, or some with about `max_tokens` target tokens, evenly spread and the same each time."""
    sizes = [len(target) + 1 for _, target in pairs]
    total = sum(sizes)
    if max_tokens is None or total <= max_tokens:
        return pairs
    chosen, scored, passed = [], 0, 0
    for pair, size in zip(pairs, sizes, strict=True):  # take a pair whenever the share scored lags behind
        if scored * total <= passed * max_tokens:
            chosen.append(pair)
            scored += size
        passed += size
    return chosen


def _judged(
    plain: TranslationResult, tokenizer: Tokenizer, pairs: list[Encoded], written: list[str], beams: int
) -> TranslationResult:
    sacrebleu = require_sacrebleu()
    references = [tokenizer.decode(target) for _, target in pairs]
    chrf, bleu = sacrebleu.metrics.CHRF(), sacrebleu.metrics.BLEU()
    scores = chrf.corpus_score(written, [references]), bleu.corpus_score(written, [references])
    shown = np.unique(np.linspace(0, len(pairs) - 1, EXAMPLES).round().astype(int)).tolist()
    return dataclasses.replace(
        plain,
        beams=beams,
        chrf=float(scores[0].score),
        bleu=float(scores[1].score),
        chrf_signature=str(chrf.get_signature()),
        bleu_signature=str(bleu.get_signature()),
        examples=tuple(Example(tokenizer.decode(pairs[i][0]), references[i], written[i]) for i in shown),
        translations=tuple(written),
    )
