"""`clearhead inspect`: what the model is fed. Text where it reads tokens, noise where it reads pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clearhead._run_commands import source_name
from clearhead.data.config import SYNTHETIC, DataConfig
from clearhead.errors import UserError
from clearhead.models.config import ModelConfig

if TYPE_CHECKING:
    from clearhead._inspect_command import Subject
    from clearhead._options import Inspect

HIDDEN = 0.15
"""Share of the tokens that a masked language model has to fill in, as BERT's recipe has it."""


@dataclass(frozen=True)
class Fed:
    """A batch as `clearhead.signal.inspect` takes it, and what it is in words."""

    batch: Any
    words: str


def make_batch(subject: Subject, data: str, asked: Inspect) -> Fed:
    """Return what the model is measured on. Raises `UserError` for a model that reads neither tokens nor pixels."""
    source = subject.source
    if isinstance(source, ModelConfig) or isinstance(getattr(source, "config", None), ModelConfig):
        return _ours(subject, data, asked)
    if getattr(source, "main_input_name", None) == "pixel_values":
        return _pixels(subject, asked)
    return _hugging_face(subject, data, asked)


def _ours(subject: Subject, data: str, asked: Inspect) -> Fed:
    source = subject.source
    config = source if isinstance(source, ModelConfig) else source.config
    encode, by = subject.tokenizer, "the model's tokenizer"
    if encode is None and config.vocab_size >= 257:
        from clearhead.data.tokenizer import ByteTokenizer

        encode, by = ByteTokenizer().encode, "bytes"
    ids_bt, words = _tokens(encode, by, config.vocab_size, asked.context or config.context, subject, data, asked)
    if config.architecture == "seq2seq":
        return Fed({"source": ids_bt, "tokens": ids_bt.clone()}, f"{words}, the same for source and target")
    return Fed(ids_bt, words)


def _hugging_face(subject: Subject, data: str, asked: Inspect) -> Fed:
    model = subject.source
    config = model.config
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None or getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise UserError(
            f"{subject.name}: the model reads neither tokens nor pixels alone, and the command line has no "
            f"{getattr(model, 'main_input_name', 'such batch')} to give it; inspect it from Python: "
            f"ch.signal.inspect(model, batch)"
        )
    limit = _longest(model)
    tokens = asked.context or min(128, limit or 128)
    if limit is not None and tokens > limit:
        raise UserError(f"--context {tokens}: the model has positions for at most {limit} tokens")
    ids_bt, words = _tokens(subject.tokenizer, "the folder's tokenizer", vocabulary, tokens, subject, data, asked)
    if getattr(config, "is_encoder_decoder", False):
        return Fed({"input_ids": ids_bt, "decoder_input_ids": ids_bt.clone()}, f"{words}, the same for both stacks")
    if subject.mask_id is not None and type(model).__name__.endswith("ForMaskedLM"):
        import torch

        hidden = torch.rand(ids_bt.shape, generator=torch.Generator().manual_seed(asked.seed)) < HIDDEN
        hidden[:, 0] = True  # each sequence has one at least
        hidden = hidden.to(ids_bt.device)
        masked = {"input_ids": ids_bt.masked_fill(hidden, subject.mask_id), "labels": ids_bt.masked_fill(~hidden, -100)}
        return Fed(masked, f"{words}, {HIDDEN:.0%} of them hidden")
    return Fed({"input_ids": ids_bt}, words)


def _longest(model: Any) -> int | None:
    """Tokens that a table of positions has room for; None without one."""
    from clearhead.anatomy.find import anatomy_of

    tables = [part for part in anatomy_of(model).stacks[0].embeddings if part.role == "position"]
    rows = [getattr(part.module, part.leaf).shape[-2] for part in tables]
    said = getattr(model.config, "max_position_embeddings", None)
    rows += [said] if rows and isinstance(said, int) else []
    # RoBERTa and its kin count positions from behind the padding's.
    offset = getattr(tables[0].module, "padding_idx", None) if tables else None
    return min(rows) - (0 if offset is None else offset + 1) if rows else None


def _pixels(subject: Subject, asked: Inspect) -> Fed:
    import torch

    if asked.data is not None:
        raise UserError(f"--data: {subject.name} reads pixels and is measured on noise; leave out --data")
    config = subject.source.config
    size = getattr(config, "image_size", None)
    height, width = (size, size) if isinstance(size, int) else tuple(size or ())[-2:] or (None, None)
    if height is None:
        raise UserError(
            f"{subject.name}: its config gives no image_size; inspect it from Python with a batch of your own"
        )
    shape = (asked.batch, int(getattr(config, "num_channels", 3)), int(height), int(width))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(asked.seed))
    weight = next(subject.source.parameters())
    words = f"{shape[0]} images of {shape[2]} x {shape[3]} pixels of standard normal noise, no real images"
    return Fed({"pixel_values": noise.to(weight.device, weight.dtype)}, words)


def _tokens(
    encode: Any, by: str, vocabulary: int, tokens: int, subject: Subject, data: str, asked: Inspect
) -> tuple[Any, str]:
    """(ids [b, t], what they are)."""
    import numpy as np
    import torch

    from clearhead.data.synthetic.source import SyntheticData

    rows, draw = asked.batch, np.random.default_rng(asked.seed)
    if data.startswith(SYNTHETIC):
        drawn = SyntheticData(DataConfig(source=data, context=tokens))
        ids, words = drawn.rows("val", range(rows), tokens).tokens, f"tokens of {data}"
        if drawn.vocab_size > vocabulary:
            raise UserError(f"{data} has {drawn.vocab_size} symbols, but the model's vocabulary has {vocabulary}")
    elif encode is None:
        p = 1.0 / np.arange(1, vocabulary + 1)
        ids, words = draw.choice(vocabulary, size=(rows, tokens), p=p / p.sum()), "tokens drawn by Zipf's law"
    else:
        ids = _windows(np.asarray(encode(_text(data, rows * tokens * 12)), dtype=np.int64), rows, tokens, draw, data)
        words = f"tokens of {data} ({by})"
        if int(ids.max()) >= vocabulary:
            raise UserError(
                f"{subject.name}: its tokenizer gives the id {int(ids.max())}, but the model's vocabulary has "
                f"{vocabulary} (0 to {vocabulary - 1}); put the tokenizer that belongs to the model into the folder"
            )
    source = subject.source
    device = "cpu" if isinstance(source, ModelConfig) else next(source.parameters()).device
    return torch.as_tensor(ids, dtype=torch.int64, device=device), f"{rows} sequences of {tokens} {words}"


def _text(data: str, bytes_wanted: int) -> str:
    from clearhead.data.sources import resolve

    pieces: list[str] = []
    held = 0
    for document in resolve(source_name(data)).documents():
        pieces.append(document.data[:bytes_wanted].decode("utf-8", errors="ignore"))
        held += len(pieces[-1])
        if held >= bytes_wanted:
            break
    return "\n".join(pieces)


def _windows(ids: Any, rows: int, tokens: int, draw: Any, data: str) -> Any:
    import numpy as np

    if len(ids) < tokens + 1:
        raise UserError(
            f"{data}: {len(ids)} tokens are too few for a sequence of {tokens}; give more text or --context"
        )
    starts = draw.integers(0, len(ids) - tokens, rows)
    return np.stack([ids[start : start + tokens] for start in starts])
