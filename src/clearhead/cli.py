"""The command line: `clearhead COMMAND`. Reads arguments, calls the room that does the work, prints.

Nothing heavy is imported here: `clearhead --help` needs no torch, and each command imports its room when it runs. The
options of `train` are the fields of the config dataclasses with their texts as help, so each is defined in one place.
A mistake of the user is a `UserError`: one line and exit code 2, never a traceback.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from clearhead._arguments import given, merge, parse
from clearhead._disk import disk_error, words
from clearhead._run_commands import as_user_error, source_name
from clearhead.errors import PeerLost, UserError, unknown

if TYPE_CHECKING:
    from clearhead.train.config import RunConfig

HELP = """\
usage: clearhead COMMAND [options]        clearhead COMMAND --help explains one of them

Find where a transformer loses its signal, fix it in one line, and prove that the fix helped.

commands
  inspect    find out where a model loses its signal: theory beside measurement, and advice
  compare    train several attentions on the same text and seeds; write report.html with a verdict
  train      train one model; stop it at any time, the same command goes on
  finetune   train a pretrained model further, with another attention
  evaluate   score a trained run, document by document
  generate   continue a text with a trained run, fill in hidden tokens, or translate
  data       list the data sets, fetch one, or print where it is
  hf         say which architectures of transformers can be patched, by running it
  bench      time attentions against PyTorch's own, and beside other libraries
  explain    say which backend would compute an attention, and why the others would not

first steps
  clearhead compare --preset quick                   a first report in about two minutes
  clearhead compare                                  the real one: five seeds, about ten minutes on two cores
  clearhead compare --data my.txt --attention softmax laser softmax+selective
  clearhead train --out runs/first --model tiny      one small model on Shakespeare
  clearhead generate runs/first --prompt "To be"
  clearhead train --out runs/de --task translation   English to German, an encoder-decoder
  clearhead finetune --model smollm2                 temperatures and LoRA on a pretrained model

exit codes: 0 done, 1 a fault of this program (a traceback is saved), 2 a mistake in the request, 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; the entry point of `clearhead`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        _complain(str(error))
        if isinstance(error, PeerLost):  # threads of torch may wait for the dead, and so would an ordinary end
            sys.stdout.flush()
            os._exit(2)
        return 2
    except KeyboardInterrupt:
        _complain("interrupted; the same command goes on")
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        fault = disk_error(error)
        if fault is not None:
            _complain(f"{fault.filename or 'a file of this command'}: {words(fault)}; mend that and run again")
            return 2
        where = _save_traceback(arguments)
        _complain(f"unexpected {type(error).__name__}: {error}; this is a bug, the traceback is {where}")
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from clearhead import __version__

        print(f"clearhead {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        raise unknown("command", arguments[0], COMMANDS)
    return COMMANDS[arguments[0]](arguments[1:])


def _complain(message: str) -> None:
    """Print one red line on stderr, whatever is in the message."""
    from rich.console import Console
    from rich.text import Text

    line = " ".join(message.split())
    Console(stderr=True).print(Text(f"clearhead: {line}", style="red"), soft_wrap=True)


def _say(line: str) -> None:
    """Report progress on stderr, so that stdout holds results alone."""
    print(line, file=sys.stderr, flush=True)


def _save_traceback(arguments: list[str]) -> str:
    """Keep the traceback in a file and say where; on a full disk it goes to the terminal."""
    command, trace = f"clearhead {' '.join(arguments)}", traceback.format_exc()
    try:
        handle, name = tempfile.mkstemp(prefix="clearhead-bug-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {command}\n\n{trace}")
    except OSError:
        print(trace, file=sys.stderr)
        return "above"
    return f"in {name}"


# ---- compare ----


def _compare(arguments: list[str]) -> int:
    from clearhead._options import Compare

    asked = parse(Compare, "compare", merge(arguments, "--attention", "--arm", "--set", "--learning-rates"))
    if asked.redraw is not None:
        if dataclasses.replace(asked, redraw=None) != Compare():
            raise UserError("--from redraws a comparison as it is; leave the other options out")
        from clearhead.compare.report import redraw

        redraw(asked.redraw)
        print(asked.redraw / "report.html")
        return 0
    request: dict[str, Any] = {
        "preset": asked.preset,
        "model": None if asked.model is None else source_name(asked.model),
        "attention": asked.attention,
        "arms": asked.arm,
        "baseline": asked.baseline,
        "seeds": asked.seeds,
        "data": None if asked.data is None else source_name(asked.data),
        "context": asked.context,
        "steps": asked.steps,
        "budget": asked.budget,
        "learning_rates": asked.learning_rates or None,
        "overrides": asked.set,
        "workers": asked.workers,
        "folder": asked.out,
    }
    if asked.budget_minutes is None:
        from clearhead.compare.plan import ComparePlan

        plan = ComparePlan.build(**request)
    else:
        from clearhead.compare.budget import sized

        plan = sized(asked.budget_minutes, **request)
    from clearhead.compare.run import compare

    compare(plan)
    return 0


# ---- inspect ----


def _inspect(arguments: list[str]) -> int:
    from clearhead._options import Inspect

    asked = parse(Inspect, "inspect", merge(arguments, "--set"))
    if asked.batch < 1 or (asked.context is not None and asked.context < 2):
        raise UserError("inspect: expected at least one sequence (--batch) of at least two tokens (--context)")
    from clearhead._inspect_command import inspect

    with as_user_error():
        return inspect(asked)


# ---- train ----


def train_config(arguments: list[str]) -> tuple[RunConfig, Path]:
    """Read the arguments of `train` into a run's configuration and its folder."""
    from clearhead._inspect_command import read_model_config
    from clearhead._options import DEFAULT_STEPS, TRANSLATION_DATA, TRANSLATION_TRAIN, Train
    from clearhead.models.config import PRESETS
    from clearhead.objectives.config import RECIPES, ObjectiveConfig
    from clearhead.train.config import PRETRAINED, TASKS, RunConfig, TrainConfig, vocabulary_size

    size = given(arguments, "--model") or "small"
    if size not in PRESETS and not size.endswith(".json"):
        raise unknown("size of --model", size, PRESETS)
    model_start = PRESETS[size] if size in PRESETS else read_model_config(Path(size))
    architecture = given(arguments, "--model.architecture")
    if architecture == PRETRAINED:
        raise UserError("--model.architecture pretrained: see `clearhead finetune`, which trains a pretrained model")
    if architecture is not None and architecture not in TASKS:
        raise unknown("architecture", architecture, TASKS)
    task = given(arguments, "--task") or (TASKS[architecture] if architecture else "causal_lm")
    if task not in TASKS.values():
        raise unknown("task", task, TASKS.values())
    if architecture is None:  # a config of one's own may say; else the first architecture of the task
        own = model_start.architecture
        architecture = own if TASKS[own] == task else next(name for name, owned in TASKS.items() if owned == task)
    elif TASKS[architecture] != task:
        raise UserError(f"--task {task} does not train architecture={architecture}, which is for {TASKS[architecture]}")
    recipe = given(arguments, "--objective") or "plain"
    if recipe not in RECIPES:
        raise unknown("objective", recipe, RECIPES)
    start = RunConfig(train=TrainConfig(steps=DEFAULT_STEPS))
    data_start, train_start = start.data, start.train
    if task == "translation":
        data_start = dataclasses.replace(data_start, **TRANSLATION_DATA)
        train_start = dataclasses.replace(train_start, **TRANSLATION_TRAIN)
    asked = parse(
        Train,
        "train",
        arguments,
        ModelConfig=model_start,
        DataConfig=data_start,
        OptimConfig=start.optim,
        ObjectiveConfig=SimpleNamespace(**(ObjectiveConfig().to_dict() | RECIPES[recipe])),  # not checked yet
        TrainConfig=train_start,
    )
    if asked.context is not None and asked.segment is not None:
        raise UserError("--context and --segment say the same; give one of them")
    window = asked.context if asked.segment is None else asked.segment
    context = model_start.context if window is None else window
    memory = _memory(arguments, asked.memory, named=size in PRESETS)
    source = data_start.source if asked.source is None else source_name(asked.source)
    data = asked.data.build(source=source, context=context)
    vocabulary = vocabulary_size(data, TASKS[architecture])
    steps = DEFAULT_STEPS if asked.steps is None and asked.tokens is None else asked.steps
    own_warmup = given(arguments, "--optim.warmup-steps") or given(arguments, "--optim.warmup_steps")
    config = RunConfig(
        model=asked.model.build(vocab_size=vocabulary, context=context, architecture=architecture, **memory),
        data=data,
        optim=asked.optim.build() if own_warmup else asked.optim.build(warmup_steps=0),
        objective=asked.objective.build(),
        train=asked.train.build(steps=steps, tokens=asked.tokens),
    )
    if not own_warmup:  # the default, but never more than a tenth of a short run
        warmup = min(start.optim.warmup_steps, config.total_steps // 10)
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_steps=warmup))
    return config, asked.out


def _memory(arguments: list[str], layout: str | None, *, named: bool) -> dict[str, str]:
    """Options of the model that --memory stands for; `named`: it begins from a named size, not from a file."""
    if layout is None:
        return {}
    if given(arguments, "--model.memory") is not None:
        raise UserError("--memory and --model.memory say the same; give one of them")
    return {"memory": layout} | ({"position": "xl"} if named and given(arguments, "--model.position") is None else {})


def _train(arguments: list[str]) -> int:
    config, folder = train_config(arguments)
    _carry_out(config, folder)
    return 0


def _carry_out(config: RunConfig, folder: Path) -> None:
    """Train, and say in a line how it ended."""
    from clearhead.train.loop import train

    result = train(config, folder)
    if result.status == "interrupted":
        raise KeyboardInterrupt
    if os.environ.get("RANK", "0") == "0":  # one of the processes that torchrun started speaks for all
        words = [result.status, *([result.reason] if result.reason else [])]
        words += _scores(result.summary)
        first, *later = result.summary["val_curve"] or [{"step": -1}]
        if first["step"] == 0 and later:
            before, after = (point["bits_per_byte"] for point in (first, later[-1]))
            words.append(f"validation {_bits(before)} before the first step, {_bits(after)} after the last")
        print(f"{'; '.join(words)}; everything is in {folder}")


def _finetune(arguments: list[str]) -> int:
    from clearhead._finetune_command import finetune_run
    from clearhead._options import Finetune

    asked = parse(Finetune, "finetune", merge(arguments, "--set"))
    config, folder = finetune_run(asked)
    _carry_out(config, folder)
    if asked.export is not None:
        from clearhead._finetune_command import export_run

        export_run(folder, asked.export)
    return 0


def _scores(summary: Mapping[str, Any]) -> list[str]:
    """The test scores of a finished run in words, by its task; nothing for one that has none."""
    hidden = "text's hidden tokens"
    units = {
        "test_bits_per_byte": "{:.4f} bits per byte on the test text",
        "test_bits_per_answer": "{:.4f} bits per answer",
        "test_accuracy": f"{{:.1%}} of the test {'answers' if 'test_answers' in summary else hidden} right",
        "test_chrf": "chrF {:.2f} on the test pairs",
        "test_bleu": "BLEU {:.2f}",
    }
    words = [unit.format(summary[key]) for key, unit in units.items() if summary.get(key) is not None]
    nats = summary.get("test_nats_per_token")
    return words if not words or nats is None or "test_bytes" in summary else [*words, f"{nats:.4f} nats per token"]


def _bits(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


# ---- evaluate and generate ----


def _evaluate(arguments: list[str]) -> int:
    from clearhead._options import Evaluate

    asked = parse(Evaluate, "evaluate", arguments)
    if asked.tasks:
        from clearhead.evaluation.command import evaluate_tasks

        evaluate_tasks(asked)
        return 0
    from clearhead._run_commands import evaluate

    evaluate(asked)
    return 0


def _generate(arguments: list[str]) -> int:
    from clearhead._options import Generate
    from clearhead._run_commands import generate

    generate(parse(Generate, "generate", arguments))
    return 0


# ---- data, hf, bench and explain ----


def _data(arguments: list[str]) -> int:
    from clearhead.data.command import run

    return run(arguments)


def _hf(arguments: list[str]) -> int:
    from clearhead._hf_command import run

    return run(arguments)


def _bench(arguments: list[str]) -> int:
    from clearhead._bench_command import run

    return run(arguments)


def _explain(arguments: list[str]) -> int:
    from clearhead._explain_command import explain_command
    from clearhead._options import Explain

    explain_command(parse(Explain, "explain", arguments))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "inspect": _inspect,
    "compare": _compare,
    "train": _train,
    "finetune": _finetune,
    "evaluate": _evaluate,
    "generate": _generate,
    "data": _data,
    "hf": _hf,
    "bench": _bench,
    "explain": _explain,
}

if __name__ == "__main__":
    sys.exit(main())
