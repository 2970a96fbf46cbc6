"""`clearhead evaluate` and `clearhead generate`: what can be done with a trained run, by its task. Used by `cli.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clearhead.data.config import SYNTHETIC
from clearhead.errors import UserError

if TYPE_CHECKING:
    from clearhead._options import Evaluate, Generate
    from clearhead.train.config import RunConfig

MASK = "[MASK]"


def evaluate(asked: Evaluate) -> None:
    """Score a run and print the scores."""
    for name in ("tasks_folder", "limit", "shots"):
        if getattr(asked, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} belongs to --tasks; name some, or leave it out")
    config, tokenizer, model = open_run(asked.run, asked.device)
    source = config.data.source if asked.data is None else source_name(asked.data)
    context = config.data.context
    if asked.context is not None and source.startswith(SYNTHETIC):
        context = asked.context  # drawn at that length, not at the run's
    data = dataclasses.replace(config.data, source=source, context=context)
    if asked.lengths and (config.task != "causal_lm" or config.data.synthetic is not None):
        raise UserError("--lengths compares contexts on the text of a causal_lm run; leave it out")
    by_task = {"causal_lm": _score_text, "masked_lm": _score_masked, "translation": _score_pairs}
    generated = config.data.synthetic is not None
    if generated != (data.synthetic is not None):
        what = "a generated task" if generated else "text"
        raise UserError(f"--data {source}: this run was trained on {what}; other data for it must be {what} too")
    with as_user_error():
        score = _score_answers if generated else by_task[config.task]
        result, show = score(asked, config, data, tokenizer, model)
        segments = _score_segments(asked, config, data, tokenizer, model)
    if asked.json:
        about = {"run": str(asked.run), "task": config.task, "data": source}
        beside = {} if segments is None else {"segments": segments.to_dict()}
        print(json.dumps(about | result.to_dict() | beside, indent=1, ensure_ascii=False))
    else:
        show(result, source)
        if segments is not None:
            _print_segments(segments)


def generate(asked: Generate) -> None:
    """Continue a text, fill in what is hidden in it, or translate it; print that."""
    config, tokenizer, model = open_run(asked.run, asked.device)
    if config.data.synthetic is not None:
        raise UserError("this run answers questions of a generated task and writes nothing; see: clearhead evaluate")
    try:
        prompt = tokenizer.encode(asked.prompt.replace(MASK, "") if config.task == "masked_lm" else asked.prompt)
    except UnicodeEncodeError as error:
        raise UserError("--prompt holds bytes that are not text in this terminal's encoding") from error
    with as_user_error():
        if config.task == "translation":
            print(_translation(asked, config, tokenizer, model, prompt))
        elif config.task == "masked_lm":
            print(_filled(asked, tokenizer, model))
        else:
            print(_continuation(asked, config, tokenizer, model, prompt))


@contextlib.contextmanager
def as_user_error() -> Iterator[None]:
    """Turn a library's ValueError about an argument that the user gave into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def source_name(name: str) -> str:
    """Make a path absolute, so that a run can be gone on with from any folder; leave a data set's name alone."""
    from clearhead.data.catalogue import CATALOGUE, find_pair

    path = Path(name).expanduser()
    known = name in CATALOGUE or find_pair(name) is not None
    return str(path.absolute()) if not known and path.exists() else name


def open_run(folder: Path, device: str) -> tuple[RunConfig, Any, Any]:
    """Return a run's configuration, its tokenizer and its newest model."""
    from clearhead.train.folder import TOKENIZER, read_config

    config = read_config(folder)
    from clearhead.data.tokenizer import load_tokenizer
    from clearhead.models.io import load_model
    from clearhead.train.checkpoint import newest_model
    from clearhead.train.world import choose_device

    model = load_model(newest_model(folder), device=choose_device(device, 0))
    return config, load_tokenizer(folder / TOKENIZER), model


def _refuse(asked: Any, config: RunConfig, *names: str) -> None:
    """Refuse options that mean nothing for the run's task."""
    for name in names:
        if getattr(asked, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} means nothing for a {config.task} run; leave it out")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---- scores ----


def _score_text(asked: Evaluate, config: RunConfig, data: Any, tokenizer: Any, model: Any) -> tuple[Any, Any]:
    from clearhead.data.retokenize import documents_for
    from clearhead.train.evaluate import evaluate as score
    from clearhead.train.evaluate_stream import evaluate_stream

    _refuse(asked, config, "beams")
    documents = documents_for(tokenizer, data, asked.split, progress=_say)
    layout = (config.model.memory if asked.memory is None else asked.memory) or None
    if asked.lengths:
        return _score_lengths(asked, config, documents, layout, model), _print_lengths
    if layout or config.model.feedback_carry:
        if asked.stride is not None:
            raise UserError("--stride means nothing with a memory: segments follow each other; leave it out")
        result = evaluate_stream(
            model, documents, asked.split, layout=layout, segment=asked.context, max_tokens=asked.tokens
        )
    else:
        result = score(
            model, documents, asked.split, context=asked.context, stride=asked.stride, max_tokens=asked.tokens
        )
    return result, _print_text


def _score_lengths(asked: Evaluate, config: RunConfig, documents: Any, layout: str | None, model: Any) -> Any:
    from clearhead.train.evaluate_lengths import evaluate_lengths

    if layout or config.model.feedback_carry:
        raise UserError(
            "--lengths cuts windows that know nothing of what stood before them, which a memory does; score it with "
            "--memory full:N for several N"
        )
    for name in ("context", "segments", "beams"):
        if getattr(asked, name) is not None:
            raise UserError(f"--{name} means nothing with --lengths, which says the contexts itself; leave it out")
    return evaluate_lengths(
        model, documents, asked.split, asked.lengths, trained=config.data.context, stride=asked.stride,
        max_tokens=asked.tokens,
    )  # fmt: skip


def _score_masked(asked: Evaluate, config: RunConfig, data: Any, tokenizer: Any, model: Any) -> tuple[Any, Any]:
    from clearhead.data.retokenize import documents_for
    from clearhead.train.score_masked import score_masked
    from clearhead.train.tasks.masked_lm import mask_token

    _refuse(asked, config, "beams", "stride", "memory")
    result = score_masked(
        model,
        documents_for(tokenizer, data, asked.split, progress=_say),
        asked.split,
        tokenizer=tokenizer,
        mask_token=mask_token(tokenizer),
        fraction=config.train.mask_fraction,
        context=asked.context,
        max_tokens=asked.tokens,
    )
    return result, _print_masked


def _score_pairs(asked: Evaluate, config: RunConfig, data: Any, tokenizer: Any, model: Any) -> tuple[Any, Any]:
    from clearhead.data.pairs import pairs_for
    from clearhead.train.score_pairs import score_pairs

    _refuse(asked, config, "context", "stride", "memory", "segments")
    if asked.split == "all":
        raise UserError("--split all: pairs are scored by split; give train, val or test")
    result = score_pairs(
        model,
        pairs_for(tokenizer, data, progress=_say),
        asked.split,
        max_tokens=asked.tokens,
        beams=config.train.beams if asked.beams is None else asked.beams,
        length_penalty=config.train.length_penalty,
    )
    return result, _print_pairs


def _score_answers(asked: Evaluate, config: RunConfig, data: Any, tokenizer: Any, model: Any) -> tuple[Any, Any]:
    from clearhead.data.synthetic.source import SyntheticData
    from clearhead.train.score_answers import score_answers

    _refuse(asked, config, "beams", "stride", "segments")
    if asked.split == "all":
        raise UserError("--split all: a generated task has no end; give train, val or test")
    drawn = SyntheticData(data)
    if drawn.tokenizer.to_dict() != tokenizer.to_dict():
        raise UserError(
            f"--data {data.source}: it has other symbols than the run's {config.data.source}; the options that change "
            f"the vocabulary must be the run's"
        )
    layout = config.model.memory if asked.memory is None else asked.memory
    if asked.memory is not None and config.model.architecture == "feedback":
        raise UserError("--memory: architecture=feedback remembers feedback_window tokens; leave it out")
    remembers = bool(layout) or config.model.feedback_carry
    if not remembers and drawn.length != data.context:
        raise UserError(
            f"--data {data.source}: a length of {drawn.length} is read segment by segment, which needs a memory"
        )
    result = score_answers(
        model,
        drawn,
        asked.split,
        both_ways=config.task == "masked_lm",
        segment=data.context if remembers else None,
        layout=layout or None,
        batch_size=max(1, min(config.train.batch_size, config.tokens_per_step // drawn.length)),
        max_tokens=asked.tokens,
    )
    return result, _print_answers


def _score_segments(asked: Evaluate, config: RunConfig, data: Any, tokenizer: Any, model: Any) -> Any | None:
    from clearhead.models.config import ModelConfig

    objective = config.objective
    if asked.segments is None and not objective.reads_segments:
        return None
    if not isinstance(config.model, ModelConfig):
        raise UserError("--segments reads the states of clearhead's own models; leave it out for a pretrained one")
    from clearhead.data.retokenize import documents_for
    from clearhead.objectives.config import pooled_layers
    from clearhead.train.score_segments import score_segments
    from clearhead.train.tasks.segments import stored_critic

    return score_segments(
        model,
        documents_for(tokenizer, data, asked.split, progress=_say),
        asked.split,
        tokenizer=tokenizer,
        segments=objective.segments if asked.segments is None else asked.segments,
        pooled=objective.pooled,
        layers=pooled_layers(objective.pooled, config.own_model.layers),
        critic=stored_critic(config, asked.run, next(model.parameters()).device),
    )


def _print_segments(result: Any) -> None:
    found = result.information
    print(f"\nneighbouring segments ({result.segments}; states of layers: {result.pooled})")
    if result.nsp_accuracy is not None:
        print(f"  the run's own critic tells {result.nsp_accuracy:.1%} of the pairs right, {result.nsp:.4f} nats")
    print(
        f"  a fresh critic, from {found.learned_from:,} pairs, scored on {found.pairs:,} others (split by "
        f"{found.split_by}): {found.accuracy:.1%} right\n"
        f"  information in nats: E[T] {found.mean_score:.3f} (no bound), NWJ {found.nwj:.3f} and InfoNCE "
        f"{found.info_nce:.3f} of {found.choices} choices (lower bounds in expectation), Donsker-Varadhan "
        f"{found.donsker_varadhan:.3f} (lies high on a sample)"
    )


def _print_text(result: Any, source: str) -> None:
    columns = [
        ("bytes", [f"{d.bytes:,.0f}" for d in result.per_document], f"{result.bytes:,.0f}"),
        ("bits per byte", [f"{d.bits_per_byte:.4f}" for d in result.per_document], f"{result.bits_per_byte:.4f}"),
        ("perplexity per token", [f"{d.perplexity:.3f}" for d in result.per_document], f"{result.perplexity:.3f}"),
    ]
    _table(result, source, columns)
    if result.memory:
        print(f"segments of {result.context} tokens, memory {result.memory}")
    else:
        print(f"context {result.context}, each further window scores {result.stride} tokens")


def _print_lengths(result: Any, source: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.results[0].split} of {source}", title_justify="left")
    for name in ("context", "bits per byte", "to the shortest", "perplexity per token"):
        table.add_column(name, justify="right")
    first = result.results[0].bits_per_byte
    for one in result.results:
        trained = " (trained)" if one.context == result.trained else ""
        table.add_row(
            f"{one.context:,}{trained}", f"{one.bits_per_byte:.4f}", f"{one.bits_per_byte - first:+.4f}",
            f"{one.perplexity:.3f}",
        )  # fmt: skip
    Console().print(table)
    left = f"; {result.left_out} shorter than the longest context left out" if result.left_out else ""
    print(
        f"the same {result.tokens:,} tokens of {result.documents} documents at each context, {result.stride} to a "
        f"window{left}; trained at {result.trained:,}"
    )


def _print_masked(result: Any, source: str) -> None:
    rows = [document.to_dict() for document in result.per_document]
    columns = [
        ("hidden tokens", [f"{d['tokens']:,}" for d in rows], f"{result.tokens:,}"),
        ("nats per hidden token", [f"{d['nats_per_token']:.4f}" for d in rows], f"{result.nats_per_token:.4f}"),
        ("accuracy", [f"{d['accuracy']:.1%}" for d in rows], f"{result.accuracy:.1%}"),
    ]
    _table(result, source, columns)
    print(f"context {result.context}, {result.fraction:.0%} of the tokens hidden, the same ones for every model")


def _print_answers(result: Any, source: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.split} of {source}", title_justify="left", show_footer=True)
    table.add_column("tokens back", footer="all")
    totals = (f"{result.answers:,}", f"{result.bits_per_answer:.4f}", f"{result.accuracy:.1%}")
    for name, footer in zip(("answers", "bits per answer", "accuracy"), totals, strict=True):
        table.add_column(name, justify="right", footer=footer)
    for band in result.bands:
        bits = band.nats / band.answers / math.log(2)
        table.add_row(band.words, f"{band.answers:,}", f"{bits:.4f}", f"{band.right / band.answers:.1%}")
    Console().print(table)
    print(f"{result.sequences:,} sequences of {result.context:,} tokens")


def _table(result: Any, source: str, columns: Sequence[tuple[str, list[str], str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.split} of {source}", title_justify="left", show_footer=True)
    table.add_column("document", footer=f"all {len(result.per_document)}")
    for name, _, footer in columns:
        table.add_column(name, justify="right", footer=footer)
    for index, document in enumerate(result.per_document):
        table.add_row(document.name, *(cells[index] for _, cells, _ in columns))
    Console().print(table)


def _print_pairs(result: Any, source: str) -> None:
    how = "greedy" if result.beams == 1 else f"{result.beams} beams"
    print(f"{result.split} of {source}: {result.pairs:,} pairs, {result.left_out:,} more are longer than the context")
    print(f"  {result.nats_per_token:.4f} nats per token   chrF {result.chrf:.2f}   BLEU {result.bleu:.2f}   ({how})")
    print(f"  {result.chrf_signature}\n  {result.bleu_signature}\n")
    for example in result.examples:
        print(f"  source     {example.source}\n  reference  {example.reference}\n  model      {example.translation}\n")


# ---- texts ----


def _continuation(asked: Generate, config: RunConfig, tokenizer: Any, model: Any, prompt: Any) -> str:
    import torch

    from clearhead.models.generate import generate as sample
    from clearhead.models.pretrained_config import PretrainedConfig

    _refuse(asked, config, "beams")
    device = next(model.parameters()).device
    if config.task == "causal_lm" and isinstance(config.model, PretrainedConfig):
        ids = model.continue_text(
            torch.tensor([[tokenizer.separator, *prompt.tolist()]], device=device),
            max_new_tokens=asked.tokens,
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            seed=asked.seed,
            stop_token=tokenizer.separator,
        )
        return str(tokenizer.decode(ids[0].cpu().numpy()))
    ids = sample(
        model,
        torch.tensor([[tokenizer.separator, *prompt.tolist()]], device=device),
        max_new_tokens=asked.tokens,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        generator=torch.Generator(device).manual_seed(asked.seed),
        stop_token=tokenizer.separator,
    )
    return str(tokenizer.decode(ids[0].cpu().numpy()))


def _translation(asked: Generate, config: RunConfig, tokenizer: Any, model: Any, prompt: Any) -> str:
    from clearhead.train.score_pairs import translate

    _refuse(asked, config, "temperature", "top_k", "top_p")
    limit = config.data.context
    if not len(prompt):
        raise UserError("--prompt: give the text to translate")
    if len(prompt) >= limit:
        raise UserError(
            f"--prompt: {len(prompt)} tokens; this run translates up to {limit - 1}, translate sentence by sentence"
        )
    beams = 4 if asked.beams is None else asked.beams
    texts = translate(
        model,
        tokenizer,
        [prompt],
        limit=min(limit, max(asked.tokens, 1)),
        beams=beams,
        length_penalty=config.train.length_penalty,
    )
    return texts[0]


def _filled(asked: Generate, tokenizer: Any, model: Any) -> str:
    """Put the likeliest token in the place of each mask, all at once, as the model was trained."""
    import torch

    from clearhead.train.tasks.masked_lm import mask_token

    parts = asked.prompt.split(MASK)
    if len(parts) < 2:
        raise UserError(
            f"--prompt: this run fills in what is hidden; write {MASK} for each hidden token "
            f"({'a byte' if tokenizer.kind == 'bytes' else 'a byte pair'}), such as --prompt 'To be, or n{MASK}t'"
        )
    if asked.temperature is not None or asked.top_k is not None or asked.top_p is not None or asked.beams is not None:
        raise UserError(
            "a masked_lm run takes the likeliest tokens; leave --temperature, --top-k, --top-p, --beams out"
        )
    ids = [tokenizer.separator]
    for index, part in enumerate(parts):
        ids += [mask_token(tokenizer)] * (index > 0) + tokenizer.encode(part).tolist()
    tokens_1t = torch.tensor([ids], device=next(model.parameters()).device)
    with torch.no_grad():
        logits_1tV = model(tokens_1t)[..., : tokenizer.vocab_size].clone()  # no mask
        logits_1tV[..., tokenizer.separator] = -torch.inf  # and no separator
    hidden_1t = tokens_1t == mask_token(tokenizer)
    filled = torch.where(hidden_1t, logits_1tV.argmax(dim=-1), tokens_1t)
    return str(tokenizer.decode(filled[0].cpu().numpy()))
