"""Beam search: the target of a seq2seq model that scores best, found by keeping the k best beginnings.

    score(y) = log p(y | source) / ((5 + |y|) / 6)^alpha          alpha is `length_penalty`

The divisor is that of Wu et al. (arXiv 1609.08144, eq. 14), |y| counts the end token. alpha = 0 compares plain
probabilities (short targets win), 1 nearly the mean per token. A beginning is finished when its end token is among the
k best continuations of all beams; with one beam this is greedy search.

Legend: b sources still searched, k beams, t tokens so far, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clearhead.models.seq2seq import Seq2Seq


@dataclass(frozen=True)
class Hypothesis:
    """A target without its start and end tokens."""

    tokens: tuple[int, ...]
    score: float
    """The score of the top of this file."""
    log_probability: float
    """Nats; the end token's included when it is `finished`."""
    finished: bool
    """False = cut at `max_new_tokens`."""


@dataclass
class _Source:
    """One source's finished hypotheses, and its row in the batch that was given."""

    row: int
    finished: list[Hypothesis] = field(default_factory=list)


@torch.no_grad()
def beam_search(
    model: Seq2Seq,
    source_bs: Tensor,
    *,
    start_token: int,
    stop_token: int,
    max_new_tokens: int,
    beams: int = 4,
    length_penalty: float = 0.6,
    source_valid: Tensor | None = None,
    vocabulary: int | None = None,
) -> list[list[Hypothesis]]:
    """Return for each source its hypotheses, best first: at most `beams`, at least one.

    Args:
        source_bs: token ids, integer [b, s]. source_valid: [b, s] bool, False = padding.
        start_token: what the decoder reads first. stop_token: what ends a target.
        max_new_tokens: of a target, its end token included. What is cut there counts only where nothing ended.
        beams: 1 = greedy search.
        length_penalty: alpha above.
        vocabulary: ids from here on are never produced; None = all may be.

    A source is done when it has `beams` finished hypotheses, or when none of its beams can still beat its best one:
    log probabilities only fall, so score <= log p / divisor(max_new_tokens). Rows of done sources leave the batch. The
    model is used in eval mode and returned to the mode it was in. Raises `ValueError` for arguments out of range.
    """
    if beams < 1 or max_new_tokens < 1 or not length_penalty >= 0.0:
        raise ValueError(
            f"beam_search: expected beams and max_new_tokens of at least 1 and length_penalty of at least 0, got "
            f"{beams}, {max_new_tokens} and {length_penalty}"
        )
    was_training = model.training
    model.eval()
    try:
        search = _Search(stop_token, max_new_tokens, beams, length_penalty)
        return search.run(model, source_bs, source_valid, start_token, vocabulary)
    finally:
        model.train(was_training)


class _Search:
    def __init__(self, stop: int, limit: int, beams: int, alpha: float) -> None:
        self.stop, self.limit, self.beams, self.alpha = stop, limit, beams, alpha

    def divisor(self, length: int) -> float:
        return ((5 + length) / 6) ** self.alpha

    def run(
        self, model: Seq2Seq, source_bs: Tensor, valid: Tensor | None, start: int, vocabulary: int | None
    ) -> list[list[Hypothesis]]:
        b, device = source_bs.shape[0], source_bs.device
        sources = [_Source(row) for row in range(b)]
        results: list[list[Hypothesis]] = [[] for _ in range(b)]
        # The last token that is chosen is never read, so it needs no place in the cache.
        state = model.new_state(b, self.limit, device=device)
        read_bt = torch.full((b, 1), start, dtype=torch.int64, device=device)
        logits_bV = model(source_bs, read_bt, source_valid=valid, state=state)[:, -1]
        tokens_bkt = torch.empty((b, 1, 0), dtype=torch.int64, device=device)
        scores_bk = torch.zeros((b, 1), dtype=torch.float64, device=device)
        for length in range(1, self.limit + 1):
            if vocabulary is not None:
                logits_bV = logits_bV[:, :vocabulary]
            log_p_bkV = logits_bV.double().log_softmax(dim=-1).view(*scores_bk.shape, -1)
            total_bkV = scores_bk[..., None] + log_p_bkV
            V = total_bkV.shape[-1]
            top = total_bkV.flatten(1).topk(min(2 * self.beams, total_bkV[0].numel()), dim=-1)
            origin_bc, token_bc = top.indices // V, top.indices % V
            stops_bc = token_bc == self.stop
            self._finish(sources, tokens_bkt, top.values, origin_bc, stops_bc, length)

            # The best that do not stop go on; a stable sort keeps their order.
            order_bc = stops_bc.to(torch.int8).argsort(dim=-1, stable=True)[:, : self.beams]
            going_bk = ~stops_bc.gather(1, order_bc)
            scores_bk = top.values.gather(1, order_bc).masked_fill(~going_bk, -math.inf)
            origin_bk, token_bk = origin_bc.gather(1, order_bc), token_bc.gather(1, order_bc)
            beginnings = tokens_bkt.gather(1, origin_bk[..., None].expand(-1, -1, tokens_bkt.shape[2]))
            before = tokens_bkt.shape[1]
            tokens_bkt = torch.cat((beginnings, token_bk[..., None]), dim=2)

            going = [i for i, source in enumerate(sources) if not self._done(source, scores_bk[i], length)]
            for i, source in enumerate(sources):
                if i not in going:
                    results[source.row] = self._ranked(source, tokens_bkt[i], scores_bk[i])
            if not going:
                break
            if len(going) < len(sources):
                index = torch.tensor(going, device=device)
                sources = [sources[i] for i in going]
                scores_bk, tokens_bkt, origin_bk = (t[index] for t in (scores_bk, tokens_bkt, origin_bk))
            else:
                index = torch.arange(len(sources), device=device)
            state.reorder((index[:, None] * before + origin_bk).flatten())
            logits_bV = model(None, tokens_bkt[..., -1].reshape(-1, 1), state=state)[:, -1]
        return results

    def _finish(
        self, sources: list[_Source], tokens_bkt: Tensor, values_bc: Tensor, origin_bc: Tensor, stops_bc: Tensor,
        length: int,
    ) -> None:  # fmt: skip
        """Keep the beginnings whose end token is among the best `beams` continuations."""
        found = (stops_bc[:, : self.beams] & values_bc[:, : self.beams].isfinite()).nonzero().tolist()
        for i, place in found:
            log_p = float(values_bc[i, place])
            tokens = tuple(tokens_bkt[i, int(origin_bc[i, place])].tolist())
            sources[i].finished.append(Hypothesis(tokens, log_p / self.divisor(length), log_p, True))

    def _done(self, source: _Source, scores_k: Tensor, length: int) -> bool:
        best = float(scores_k.max())
        if length == self.limit or len(source.finished) >= self.beams or best == -math.inf:
            return True
        if not source.finished:
            return False
        return best / self.divisor(self.limit) <= max(h.score for h in source.finished)

    def _ranked(self, source: _Source, tokens_kt: Tensor, scores_k: Tensor) -> list[Hypothesis]:
        """Finished hypotheses, best first; where nothing ended, the beams as they stand."""
        found = source.finished
        if not found:
            divisor = self.divisor(tokens_kt.shape[1])
            found = [
                Hypothesis(tuple(tokens), score / divisor, score, False)
                for tokens, score in zip(tokens_kt.tolist(), scores_k.tolist(), strict=True)
                if score > -math.inf
            ]
        return sorted(found, key=lambda h: -h.score)[: self.beams]
