"""`train`: one run in one folder, from the first step to `result.json`, however often it is stopped in between."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from clearhead._disk import disk_errors
from clearhead.errors import PeerLost, UserError
from clearhead.models.make import build_model
from clearhead.models.pretrained_config import PretrainedConfig
from clearhead.train import checkpoint as store
from clearhead.train import environment
from clearhead.train.companion import companion_of
from clearhead.train.config import RunConfig
from clearhead.train.evaluate import Interrupted
from clearhead.train.folder import ENDED, RESULT, TOKENIZER, RunResult, claim, read_result, write_result
from clearhead.train.history import History
from clearhead.train.inspection import Inspection, read_records
from clearhead.train.optimizer import build_optimizer, set_learning_rate
from clearhead.train.recorder import Caller, Event, JsonLines, Recorder, Sink, TensorBoard, Terminal
from clearhead.train.repeatable import seed_generators, settings_put_back
from clearhead.train.schedule import learning_rate
from clearhead.train.start import start_model
from clearhead.train.step import StepResult, train_step
from clearhead.train.stop import StopRequest
from clearhead.train.summary import step_tokens, summarize, tokens_read
from clearhead.train.tasks.task import Task, prepare_task
from clearhead.train.world import World, local


def train(
    config: RunConfig,
    folder: Path | str,
    *,
    resume: bool = True,
    on_event: Callable[[Event], object] | None = None,
    progress: bool = True,
) -> RunResult:
    """Train as `config` says, in `folder`, and return how it ended.

    The same call again goes on where a stopped run was, and returns at once when the run has ended. Ctrl-C and SIGTERM
    save a checkpoint and return status "interrupted"; a second Ctrl-C stops at once. A run whose loss or weights are no
    longer finite has status "diverged", which is a result like "finished": see `summary` for what is recorded.

    Args:
        resume: False = raise instead of going on with what `folder` holds.
        on_event: called with every event, a dict with "kind": "train" and "eval" (the lines of metrics.jsonl), "step"
            (each step), "checkpoint", "note", "warning".
        progress: show a bar on standard error.

    Under torchrun every process calls it alike; only rank 0 writes, speaks and calls `on_event`.

    Raises:
        UserError: another config, process or text in the folder, a missing device, no whole checkpoint, a full disk.
        Exception: whatever else goes wrong, after `result.json` was written with status "crashed"; the run can go on
            from its last checkpoint.
    """
    folder = Path(folder)
    with World.join(config.train) as world, settings_put_back(), ExitStack() as held:
        if world.writes:
            held.enter_context(claim(folder, config, resume=resume))
        ended = world.share(_ended(folder) if world.writes else None)
        if ended is not None:
            return RunResult(ended["status"], ended["reason"], folder, ended["summary"])
        run = Run(config, folder, world, on_event, progress)
        held.callback(run.recorder.close)
        try:
            return run.carry_out()
        except Exception as error:
            if world.lost(error):
                raise PeerLost(
                    f"{folder}: another process of this run is gone ({' '.join(str(error).split())[:120]}); start it "
                    f"again with the same command, it goes on from its last checkpoint"
                ) from error
            if world.writes and not isinstance(error, UserError):
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                with suppress(UserError):  # a full disk must not hide what went wrong first
                    write_result(RunResult("crashed", reason, folder, run.summary()))
            raise


class Run:
    """The state of a run between its steps."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        world: World,
        on_event: Callable[[Event], object] | None,
        progress: bool,
    ) -> None:
        self.config, self.folder, self.world, self.progress = config, folder, world, progress
        self.curve: list[dict[str, Any]] = []
        # Steps after which the last evaluation and the last checkpoint were made. A pretrained model has a score before
        # its first step; one of our own begins from noise.
        self.evaluated, self.saved = (-1 if isinstance(config.model, PretrainedConfig) else 0), 0
        self.diverged = ""
        self.starts = 1
        self.load_at_start = environment.load_average()
        self._spent = {"wall_seconds": 0.0, "cpu_seconds": 0.0}  # by earlier starts
        self._began = {"wall_seconds": time.perf_counter(), "cpu_seconds": time.process_time()}

        found, damaged = store.read_newest(folder)
        threads = config.train.threads or (found.state["threads"] if found else torch.get_num_threads())
        torch.set_num_threads(threads)

        self.task = self._prepare_task()
        self.data = self.task.data
        self.model = start_model(config, self.task, world, build_model, resumed=found is not None)
        self.companion = companion_of(self.task)
        self._model_facts = {
            "parameters": self.model.count_parameters(),
            "flops_per_token": self.model.flops_per_token(config.data.context),
            **self.companion.costs(self.model),
        }
        self.companion.module.to(world.device)
        if found is None:
            self.companion.begin(self.model)
        self.history = History(self.companion.columns)
        self.called = world.wrap(self.model, compiled=config.train.compile)
        groups = self.model.parameter_groups() + self.companion.parameter_groups()
        self.optimizer = build_optimizer(groups, config.optim)
        if found is not None:
            self._restore(found)
        self.recorder = Recorder(*self._sinks(on_event))
        self.inspection = Inspection(config, world.share(read_records(folder) if world.writes else []))
        for line in damaged:
            self._warn(f"{folder}: {line}; going on from step {self.step}")
        if found is not None:
            shared = found.state["config"]["train"]["parallel"]
            if shared != config.train.parallel:
                self._warn(
                    f"{folder} was begun with train.parallel={shared} and goes on with {config.train.parallel}: sums "
                    f"come in another order and dropout draws other numbers, so the last bits may differ from here on"
                )
            if found.state["torch"] != torch.__version__:
                self._warn(
                    f"{folder} was begun with torch {found.state['torch']}; the last bits may differ from here on"
                )
            self.recorder("note", text=f"going on after step {self.step} of {config.total_steps}")

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.history)

    def carry_out(self) -> RunResult:
        """Do whatever is due next until the run is over or somebody asks to stop."""
        config, total = self.config.train, self.config.total_steps
        world = self.world
        if world.writes:
            (self.folder / RESULT).unlink(missing_ok=True)  # of a crashed start
            if not (self.folder / TOKENIZER).exists():
                with disk_errors(TOKENIZER, "the checkpoints are untouched"):
                    self.data.tokenizer.save(self.folder / TOKENIZER)
        with StopRequest(patient=world.size > 1, announce=self.progress and world.writes) as stop:
            # One process can stop within an evaluation; several agree on it in the next step, where they meet anyway.
            should_stop = (lambda: stop.requested) if world.size == 1 else (lambda: False)
            agreed = False
            try:
                while not self.diverged:
                    agreed = agreed or should_stop()
                    if agreed:
                        raise Interrupted
                    if self.evaluated < 0 or (self._due(config.eval_every) and self.evaluated < self.step):
                        self.evaluate_validation(should_stop)
                    elif self._due(config.checkpoint_every) and self.saved < self.step:
                        self.save()
                    elif self.step < total and self.inspection.due(self.step):
                        self.inspect()
                    elif self.step < total:
                        agreed = self.advance(stop.requested).stop
                    else:
                        break
                if self.diverged:
                    return self._end("diverged", self.diverged)
                test = self._evaluate("test", config.test_tokens, should_stop, last=True)
                result = self._end("finished", "", test)
                if world.writes:
                    store.keep_newest(self.folder, 1)
                return result
            except Interrupted:
                if self.saved < self.step:
                    self.save()
                reason = f"stopped after step {self.step} of {total}"
                return RunResult("interrupted", reason, self.folder, self.summary())

    def advance(self, stop: bool) -> StepResult:
        """Do one step and log it when that is due."""
        config, began, began_cpu = self.config, time.perf_counter(), time.process_time()
        seed_generators(config.train.seed, self.step, self.world.rank)
        lr = learning_rate(self.step, config.total_steps, config.optim)
        set_learning_rate(self.optimizer, lr)
        micro_batches, valid_tokens = self.task.read(self.step, self.world)
        result = train_step(
            self.called,
            self.optimizer,
            micro_batches,
            valid_tokens=valid_tokens,
            clip_norm=config.optim.clip_norm,
            world=self.world,
            precision=config.train.precision,
            stop=stop,
        )
        if result.skipped:
            self.task.forget()
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
        self.history.add(
            loss=result.loss,
            grad_norm=result.grad_norm,
            skipped=float(result.skipped),
            valid_tokens=valid_tokens,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            **self.companion.measured(),
        )
        for text in self.companion.warnings(self.step):
            self._warn(text)
        speed = step_tokens(config, valid_tokens) / seconds if seconds else None
        self.recorder("step", step=self.step, loss=result.loss, tokens_per_second=speed)
        if self._due(config.train.log_every):
            self._log(lr)
        patience = config.train.diverged_after
        if result.skipped and self.step >= patience and self.history.last(patience)["skipped"].all():
            self.diverged = (
                f"loss or gradient not finite in {patience} steps in a row, to step {self.step}; they were skipped"
            )
        return result

    def inspect(self) -> None:
        """Look inside the model on the first micro-batch of the coming step; weights and random numbers stay."""
        batch = self.task.read(self.step, self.world)[0][0]
        record, warned = self.inspection.look(self.model, batch, self.step, self.world.device)
        if record is not None:
            self.recorder("signal", **record)
        for text in warned:
            self._warn(text)

    def evaluate_validation(self, should_stop: Callable[[], bool]) -> None:
        """Score the validation text and put it on the curve."""
        began = time.perf_counter()
        result = self._evaluate("val", self.config.train.eval_tokens, should_stop)
        event = self.recorder(
            "eval",
            split="val",
            **self._position(),
            **result.metrics(),
            eval_seconds=time.perf_counter() - began,
        )
        self.evaluated = self.step
        self.curve.append({k: v for k, v in event.items() if k not in ("kind", "split", "perplexity", "eval_seconds")})
        if not math.isfinite(result.nats):
            self.diverged = f"validation loss not finite after step {self.step}"

    def save(self) -> None:
        """Write a checkpoint, unless the weights are no longer worth it."""
        values = [*self.model.state_dict().values(), *self.companion.module.state_dict().values()]
        tensors = [local(tensor) for tensor in values if tensor.is_floating_point()]
        if self.world.sum(torch.stack([(~torch.isfinite(tensor)).any() for tensor in tensors]).any().float()).item():
            self.diverged = f"weights not finite after step {self.step}"
            return
        files = store.model_files(self.model) | store.optimizer_file(self.model, self.optimizer) | self.history.file()
        files |= store.memory_file(self.task.state(self.world))
        files |= store.companion_files(self.companion.module, self.optimizer)
        self.saved = self.step
        if self.world.writes:
            state_values = {
                "config": self.config.to_dict(),
                "data": self.data.fingerprint,
                "base": self._base,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "evaluated": self.evaluated,
                "curve": self.curve,
                "starts": self.starts,
                **self._clocks(),
            }
            store.write(self.folder, self.step, files, state_values)
            self.recorder("checkpoint", step=self.step)
        self.world.wait()

    def summary(self, test: Any = None) -> dict[str, Any]:
        """Return what `result.json` says so far; see `clearhead.train.summary`."""
        cuda = self.world.device.type == "cuda"
        return summarize(
            config=self.config,
            history=self.history,
            curve=self.curve,
            test=self.task.test_summary(test),
            model_facts=self._model_facts,
            data_facts={"data_fingerprint": self.data.fingerprint},
            environment=environment.describe(self.world.device),
            clocks={
                **self._clocks(),
                "starts": self.starts,
                "processes": self.world.size,
                "threads": torch.get_num_threads(),
                "load_average": {"start": self.load_at_start, "end": environment.load_average()},
                "peak_memory_bytes": environment.peak_memory_bytes(),
                "peak_memory_is": "largest resident size of the process, of its last start",
                "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(self.world.device) if cuda else None,
            },
        )

    # What the public methods are made of.

    def _due(self, every: int) -> bool:
        return self.step > 0 and (self.step == self.config.total_steps or (every > 0 and self.step % every == 0))

    @property
    def _base(self) -> str:
        """What the model began from: the fingerprint of a pretrained one's weights, empty for one of our own."""
        return getattr(self.model.config, "base", "")

    def _position(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": tokens_read(self.config, self.history),
            "seconds": self.history.total("seconds"),
            "cpu_seconds": self.history.total("cpu_seconds"),
        }

    def _log(self, lr: float) -> None:
        """Write a line about the steps since the last one: mean loss per token, last and largest gradient norm."""
        since = (self.step - 1) % self.config.train.log_every + 1
        recent = self.history.last(since)
        good = recent["skipped"] == 0
        weight = recent["valid_tokens"][good]
        self.recorder(
            "train",
            **self._position(),
            loss=float((recent["loss"][good] * weight).sum() / weight.sum()) if weight.any() else None,
            grad_norm=float(recent["grad_norm"][-1]),
            grad_norm_max=float(recent["grad_norm"].max()),
            lr=lr,
            **{name: float(recent[name][good].mean()) if good.any() else None for name in self.companion.columns},
            skipped=int(self.history.total("skipped")),
            tokens_per_second=sum(step_tokens(self.config, int(n)) for n in recent["valid_tokens"])
            / float(recent["seconds"].sum()),
        )

    def _evaluate(self, split: str, tokens: int | None, should_stop: Callable[[], bool], *, last: bool = False) -> Any:
        batch = max(1, self.config.train.batch_size // (self.config.train.grad_accum * self.world.size))
        return self.task.evaluate(
            self.model,
            split,
            tokens,
            batch_size=batch,
            world=self.world,
            should_stop=should_stop,
            last=last,
        )

    def _end(self, status: str, reason: str, test: Any = None) -> RunResult:
        result = RunResult(status, reason, self.folder, self.summary(test))
        if self.world.writes:
            write_result(result)
        self.world.wait()
        return result

    def _clocks(self) -> dict[str, float]:
        return {
            "wall_seconds": self._spent["wall_seconds"] + time.perf_counter() - self._began["wall_seconds"],
            "cpu_seconds": self._spent["cpu_seconds"] + time.process_time() - self._began["cpu_seconds"],
        }

    def _prepare_task(self) -> Task:
        """Prepare the data; under torchrun rank 0 first, then the others find it ready."""
        if not self.world.writes:
            self.world.wait()
        task = prepare_task(self.config, progress=_say if self.progress and self.world.writes else None)
        if self.world.writes:
            self.world.wait()
        return task

    def _restore(self, found: store.Checkpoint) -> None:
        state = found.state
        if state["data"] != self.data.fingerprint:
            raise UserError(
                f"{self.folder}: the text of {self.config.data.source} has changed since this run began; "
                f"restore it, or train in another folder"
            )
        if state.get("base", "") != self._base:
            raise UserError(
                f"{self.folder}: the pretrained weights of {getattr(self.config.model, 'source', '?')} have changed "
                f"since this run began; restore them, or train in another folder"
            )
        try:
            store.restore_model(self.model, found.tensors[store.MODEL])
            store.restore_optimizer(self.model, self.optimizer, found.tensors[store.OPTIMIZER])
            store.restore_companion(self.companion.module, self.optimizer, found.tensors)
        except store.Broken as problem:  # whole on the disk, so another version's
            raise UserError(
                f"{found.folder} does not fit this version's model: {problem}; use another folder"
            ) from None
        self.history.restore(found.tensors[store.HISTORY])
        self.task.restore(found.tensors.get(store.MEMORY, {}), self.world)
        self.curve, self.evaluated, self.starts = state["curve"], state["evaluated"], state["starts"] + 1
        self._spent = {name: state[name] for name in self._spent}
        self.saved = self.step

    def _sinks(self, on_event: Callable[[Event], object] | None) -> Iterator[Sink]:
        if not self.world.writes:
            return
        yield JsonLines(self.folder, self.step, self.evaluated)
        if self.config.train.tensorboard:
            yield TensorBoard(self.folder, self.step)
        if on_event is not None:
            yield Caller(on_event)
        if self.progress:
            yield Terminal(self.config.total_steps, self.step)

    def _warn(self, text: str) -> None:
        if self.world.writes:
            warnings.warn(text, stacklevel=3)
            self.recorder("warning", text=text)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _ended(folder: Path) -> dict[str, Any] | None:
    result = read_result(folder)
    if result is None or result.status not in ENDED:
        return None
    return {"status": result.status, "reason": result.reason, "summary": result.summary}
