"""`ClearheadLM`: a decoder of clearhead as lm-eval asks its models. Needs lm_eval (`pip install 'clearhead[eval]'`).

lm-eval's questions are about text; here they become tokens. Every text begins with the separator, as every document
did in training. Legend: b batch, t tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor

from clearhead.data.tokenizer import Tokenizer, load_tokenizer
from clearhead.errors import UserError
from clearhead.models.decoder import Decoder
from clearhead.models.feedback import FeedbackDecoder
from clearhead.models.generate import generate
from clearhead.models.io import load_model
from clearhead.train.checkpoint import newest_model
from clearhead.train.folder import TOKENIZER, read_config
from clearhead.train.world import choose_device

Request = tuple[Any, list[int], list[int]]


@register_model("clearhead")
class ClearheadLM(TemplateLM):
    """A trained decoder of clearhead, for `lm_eval.simple_evaluate(model=ClearheadLM("runs/first"), tasks=[...])`.

    As with lm-eval's own models, texts longer than the model's context are cut on the left, and whole documents
    (rolling) are read in windows that score each token once: each begins with one token of context, the last with as
    many as fit. Batches are padded on the right, which a causal model cannot see.

    Args:
        run: folder of a causal_lm run; or give `model` and `tokenizer`.
        context: tokens that the model sees at most; None = its config's.
        batch_size: texts at a time.

    Raises `UserError` for a run of another task and for a model with memory.
    """

    def __init__(
        self,
        run: Path | str | None = None,
        *,
        model: Decoder | FeedbackDecoder | None = None,
        tokenizer: Tokenizer | None = None,
        context: int | str | None = None,
        batch_size: int | str = 8,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if run is not None:
            folder, config = Path(run), read_config(Path(run))
            if config.task != "causal_lm" or config.data.synthetic is not None:
                raise UserError(f"{run}: lm-eval asks for the probability of texts, which a {config.task} run has not")
            model = load_model(newest_model(folder), device=choose_device(device or "auto", 0))  # type: ignore[assignment]
            tokenizer = load_tokenizer(folder / TOKENIZER)
        if model is None or tokenizer is None:
            raise UserError("ClearheadLM: give the folder of a run, or a model and its tokenizer")
        if model.config.memory or model.config.feedback_carry:
            raise UserError("lm-eval's texts come alone: a model that reads segment by segment is not asked by it yet")
        self.model = model.eval()
        self.text = tokenizer  # `tokenizer` is where lm-eval looks for Hugging Face's
        self.max_length = model.config.context if context is None else int(context)
        if not 1 <= self.max_length <= model.config.context:
            raise UserError(f"context: expected 1 to {model.config.context}, got {self.max_length}")
        self.batch_size = int(batch_size)
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """The separator: it ends a document, and stands before the next."""
        return self.text.separator

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **keywords: Any) -> list[int]:
        """Tokens of a text, the separator before them unless `add_special_tokens` is False."""
        first = [] if add_special_tokens is False else [self.text.separator]
        return first + [int(token) for token in self.text.encode(string)]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **keywords: Any
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context) and whether every token of it was the likeliest, for each request."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            for index, answer in zip(chosen, self._score([requests[i] for i in chosen]), strict=True):
                answers[index] = answer
                if isinstance(requests[index][0], tuple):  # windows of a document have no text of their own
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
        return answers

    @torch.no_grad()
    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        texts: list[list[int]] = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"lm-eval: a continuation of {len(continuation)} tokens, and the model sees {self.max_length}"
                )
            texts.append((context + continuation)[-(self.max_length + 1) :])
        longest = max(len(text) for text in texts) - 1
        tokens_bt = torch.full((len(texts), longest), self.text.separator, dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens_bt[row, : len(text) - 1] = torch.tensor(text[:-1])
        with torch.autocast(self._device.type, enabled=False):
            logits_btV = self.model(tokens_bt.to(self._device)).float()
        answers = []
        for row, (text, (_, _, continuation)) in enumerate(zip(texts, requests, strict=True)):
            told = torch.tensor(continuation, dtype=torch.int64, device=self._device)
            part_tV = logits_btV[row, len(text) - 1 - len(told) : len(text) - 1]
            nats = F.cross_entropy(part_tV, told, reduction="none").double().sum()
            answers.append((-float(nats), bool((part_tV.argmax(dim=-1) == told).all())))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole documents."""
        totals = []
        for request in requests:
            (string,) = request.args
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(string, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(nats for nats, _ in self._loglikelihood_tokens(parts)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each text up to one of its stop strings, the separator or `max_gen_toks` tokens.

        Greedy unless a task asks for `do_sample`, then by a seed of its own. Where a task does not say how long, half
        the context. Raises `UserError` for generation keywords that are not known here.
        """
        answers = []
        for number, request in enumerate(requests):
            context, given = request.args
            options = normalize_gen_kwargs(given, min(256, self.max_length // 2))
            stops, new = options.pop("until"), options.pop("max_gen_toks")
            sampled, temperature = options.pop("do_sample", False), options.pop("temperature", 1.0)
            top = {name: options.pop(name) for name in ("top_k", "top_p") if name in options}
            if options:
                raise UserError(f"lm-eval: generation keywords that clearhead does not have: {', '.join(options)}")
            if not 0 < new < self.max_length:
                raise UserError(
                    f"lm-eval: max_gen_toks={new} leaves no room for a prompt in a context of {self.max_length}; set "
                    "it in the task's generation_kwargs"
                )
            prompt_bt = torch.tensor([self.tok_encode(context)[-(self.max_length - new) :]], device=self._device)
            out_bt: Tensor = generate(
                self.model,
                prompt_bt,
                max_new_tokens=new,
                temperature=temperature if sampled else 0.0,
                generator=torch.Generator(self._device).manual_seed(number),
                stop_token=self.text.separator,
                **top,
            )
            text = self.text.decode(out_bt[0, prompt_bt.shape[1] :].cpu().numpy())
            for stop in filter(None, stops):
                text = text.partition(stop)[0]
            answers.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return answers
