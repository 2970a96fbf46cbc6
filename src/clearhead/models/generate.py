"""Sampling text from a decoder, with its cache.

Legend: b batch, t tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clearhead.models.decoder import Decoder
from clearhead.models.feedback import FeedbackDecoder


@torch.no_grad()
def generate(
    model: Decoder | FeedbackDecoder,
    prompt_bt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    valid: Tensor | None = None,
    stop_token: int | None = None,
) -> Tensor:
    """Continue each prompt and return prompt and continuation, [b, t + new], new <= `max_new_tokens`.

    Args:
        prompt_bt: token ids, integer [b, t], t at least 1.
        temperature: logits are divided by it; 0 takes the likeliest token (ties: the lowest id).
        top_k: keep the k likeliest tokens. top_p: of those, keep the fewest whose probability reaches p.
        generator: source of randomness on the model's device; None = torch's own.
        valid: [b, t] bool, False = padding on the left of a shorter prompt.
        stop_token: a row that has produced it is filled with it; generation ends once every row has.

    A model with memory goes on in training's segments of `config.context` tokens, in space that does not grow; its
    rows read in step, so prompts of unequal length (padding in `valid`) are refused.

    The model is used in eval mode and returned to the mode it was in. Raises `ValueError` for arguments out of range.
    """
    _check(prompt_bt, max_new_tokens, temperature, top_k, top_p, valid)
    was_training = model.training
    model.eval()
    try:
        b, t = prompt_bt.shape
        tokens_bt = prompt_bt
        if max_new_tokens == 0:
            return tokens_bt
        # The last token that is drawn is never read, so it needs no place in the cache.
        state: Any
        if isinstance(model, Decoder) and model.config.memory:
            if valid is not None and not bool(valid.all()):
                raise ValueError(
                    "valid: the rows of a model with memory read in step, so prompts must be of equal length; continue "
                    "each prompt in a call of its own"
                )
            valid = None
            state = model.new_stream(b, device=prompt_bt.device)
        else:
            state = model.new_state(b, t + max_new_tokens - 1, device=prompt_bt.device)
        stopped_b = torch.zeros(b, dtype=torch.bool, device=prompt_bt.device)
        logits_bV = model(prompt_bt, valid=valid, state=state)[:, -1]
        for step in range(max_new_tokens):
            next_b = sample(logits_bV, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if stop_token is not None:
                next_b = torch.where(stopped_b, stop_token, next_b)
                stopped_b = next_b == stop_token
            tokens_bt = torch.cat((tokens_bt, next_b[:, None].to(tokens_bt.dtype)), dim=1)
            if step + 1 == max_new_tokens or (stop_token is not None and bool(stopped_b.all())):
                break
            logits_bV = model(next_b[:, None], state=state)[:, -1]
        return tokens_bt
    finally:
        model.train(was_training)


def sample(
    logits_bV: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row, [b, V] -> [b] int64; arguments as in `generate`."""
    if temperature == 0.0:
        return logits_bV.argmax(dim=-1)
    probabilities = candidates(logits_bV / temperature, top_k=top_k, top_p=top_p).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def candidates(logits_bV: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Set the logits of tokens outside top_k and top_p to -inf.

    top_p keeps the shortest list of likeliest tokens whose probabilities, after top_k, add up to at least p: a token
    stays when those likelier than it have less than p together, so the likeliest always stays.
    """
    if top_k is not None and top_k < logits_bV.shape[-1]:
        kept = logits_bV.topk(top_k, dim=-1)
        logits_bV = torch.full_like(logits_bV, float("-inf")).scatter(-1, kept.indices, kept.values)
    if top_p is not None and top_p < 1.0:
        sorted_bV, order_bV = logits_bV.sort(dim=-1, descending=True, stable=True)
        share_bV = sorted_bV.softmax(dim=-1)
        likelier_bV = share_bV.cumsum(dim=-1) - share_bV
        drop_bV = likelier_bV >= top_p
        drop_bV[:, 0] = False
        logits_bV = logits_bV.masked_fill(drop_bV.scatter(-1, order_bV, drop_bV), float("-inf"))
    return logits_bV


def _check(
    prompt_bt: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    valid: Tensor | None,
) -> None:
    if prompt_bt.dim() != 2 or prompt_bt.shape[1] == 0:
        raise ValueError(
            f"prompt: expected [batch, tokens] with at least one token, got shape {tuple(prompt_bt.shape)}"
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected at least 0, got {max_new_tokens}")
    if not temperature >= 0.0:
        raise ValueError(f"temperature: expected at least 0 (0 = the likeliest token), got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, or None for all, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: expected a share in (0, 1], or None for all, got {top_p}")
    if valid is not None and not bool(valid[:, -1].all()):
        raise ValueError("valid: a prompt must end with a real token; pad shorter prompts on the left")
