"""Two processes over gloo: that they are two, that they train what one trains, that one does not outlive the other."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clearhead.data.text import TextData
from clearhead.models.io import load_model
from clearhead.train import checkpoint as store
from clearhead.train.loop import Run
from clearhead.train.tasks.task import prepare_task
from clearhead.train.world import World
from tests.faults import commands
from tests.faults.child import Child, Ended, forked, on_file_events, suicide
from tests.faults.test_disk import one_line
from tests.faults.told import fault
from tests.train.runner import uneven_batch

STILL = ("--model.dropout", "0", "--optim.clip-norm", "0.1", "--optim.eps", "1e-3", "--train.batch-size", "4")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def together(command: commands.Command, within: float = 300.0) -> list[Ended]:
    """Run a command in two processes, as torchrun would start them."""
    port = free_port()

    def ranked(rank: int) -> commands.Command:
        def one() -> int:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                GLOO_SOCKET_IFNAME="lo",
            )  # fmt: skip
            return command()

        return one

    both = [Child(ranked(rank)) for rank in (0, 1)]
    return [child.wait(within) for child in both]


def uneven(command: commands.Command) -> commands.Command:
    """With rows whose numbers of counted targets all differ: a mean of means would be another number."""

    def patched() -> int:
        TextData.batch = uneven_batch  # type: ignore[method-assign]
        return command()

    return patched


def killed_at(run: Path, step: int, command: commands.Command) -> commands.Command:
    """The process that writes is killed as it has the checkpoint of a step ready, but not yet under its name."""

    def dying() -> int:
        on_file_events(
            run, lambda event, path: suicide() if event == "os.rename" and path.endswith(f"{step}.part") else None
        )
        return command()

    return dying


def sharded(command: commands.Command) -> commands.Command:
    """Before the first step every parameter must be a DTensor, and this process's part of them about half."""

    def watched() -> int:
        from torch.distributed.tensor import DTensor

        carry_out = Run.carry_out

        def carrying_out(self: Run):
            parameters = list(self.model.parameters())
            assert all(isinstance(p, DTensor) for p in parameters)
            own, all_of_them = (sum(x) for x in zip(*((p.to_local().numel(), p.numel()) for p in parameters)))
            assert 0.3 * all_of_them < own < 0.7 * all_of_them, (own, all_of_them)
            print(f"sharded {own} of {all_of_them}")
            return carry_out(self)

        Run.carry_out = carrying_out  # type: ignore[method-assign]
        return command()

    return watched


def close(got: dict, wanted: dict) -> None:
    for name in ("loss", "grad_norm"):
        assert got["history"][name] == pytest.approx(wanted["history"][name], rel=2e-4), name
    assert got["history"]["valid_tokens"] == wanted["history"]["valid_tokens"]
    summaries = (x["result"]["summary"]["test_bits_per_byte"] for x in (got, wanted))
    assert next(summaries) == pytest.approx(next(summaries), rel=1e-5)


@fault(
    "a run goes on with 1, then 2, then 1 process ({case})",
    "a warning says so; losses, clipped gradient norms and test score as one process's, within rounding",
)
@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.full), "fsdp"])
def test_one_then_two_then_one(text, data, tmp_path, parallel):
    run, whole = tmp_path / "run", tmp_path / "whole"
    alone = uneven(commands.train(text, run, data, *STILL))
    assert forked(uneven(commands.train(text, whole, data, *STILL))).code == 0
    assert forked(killed_at(run, 4, alone)).code == -signal.SIGKILL
    assert store.checkpoints(run)[0].name == "step-00000002"

    two = uneven(commands.train(text, run, data, *STILL, "--train.parallel", parallel))
    ended = together(killed_at(run, 6, sharded(two) if parallel == "fsdp" else two))
    assert ended[0].code == -signal.SIGKILL, ended[0].err
    assert ended[1].code == 2, ended[1].err
    assert "begun with train.parallel=none and goes on with" in " ".join(ended[0].err.split())
    assert store.checkpoints(run)[0].name == "step-00000004"
    if parallel == "fsdp":
        assert all("sharded" in each.out for each in ended)
    model = load_model(store.newest_model(run))  # one process reads what two wrote
    assert all(parameter.isfinite().all() for parameter in model.parameters())

    last = forked(alone)
    assert last.code == 0, last.err
    close(commands.trained(run), commands.trained(whole))


@fault("one of two processes is killed in the middle of a step", "the other: one line, exit code 2, no waiting")
def test_a_killed_rank_ends_the_other(text, data, tmp_path):
    def dying() -> int:
        advance = Run.advance

        def advancing(self: Run, stop: bool):
            if self.step == 3 and os.environ["RANK"] == "1":
                suicide()
            return advance(self, stop)

        Run.advance = advancing  # type: ignore[method-assign]
        return commands.train(text, tmp_path / "run", data, *STILL, "--train.parallel", "ddp")()

    first, second = together(dying)  # which ends a process that hangs
    assert second.code == -signal.SIGKILL
    assert first.code == 2, first
    one_line(first.err, "another process of this run is gone .* goes on from its last checkpoint")
    assert [p.name for p in store.checkpoints(tmp_path / "run")] == ["step-00000002"]
    assert not (tmp_path / "run" / "result.json").exists()


@fault("processes that were launched together and never met", "one line, exit code 2: the number that answered")
def test_processes_that_never_joined(text, data, tmp_path):
    def apart() -> int:
        import torch.distributed as dist

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return commands.train(text, tmp_path / os.environ["RANK"], data, *STILL, "--train.parallel", "ddp")()

    for ended in together(apart):
        assert ended.code == 2, ended
        one_line(ended.err, "expected 2 processes in one group, 1 answered")
    for ended in together(commands.train(text, tmp_path / "none", data, *STILL)):
        assert ended.code == 2, ended
        one_line(ended.err, "would train 2 models apart")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_ranks_share_a_batch_and_repeat_nothing(text, data, monkeypatch, task):
    """The rows of two ranks are the rows of one process, each once."""
    from clearhead.cli import train_config

    monkeypatch.setenv("CLEARHEAD_DATA", str(data))
    options = [x for key, value in commands.SMALL.items() for x in (f"--{key.replace('_', '-')}", value)]
    words = ["--out", "x", "--data", str(text), "--model", "tiny", "--context", "32", "--steps", "9", "--task", task]
    config, _ = train_config([*words, *options, "--train.batch-size", "8", "--train.grad-accum", "2"])
    own = prepare_task(config)

    def rows(rank: int, size: int, read: Callable) -> tuple[list[list[int]], int]:
        batches, valid = read(4, World(rank, size, torch.device("cpu"), "none" if size == 1 else "ddp"))
        return [row.tolist() for batch in batches for row in batch.tokens_bt], valid

    whole, valid = rows(0, 1, own.read)
    parts = [rows(rank, 2, own.read) for rank in (0, 1)]
    assert sorted(parts[0][0] + parts[1][0]) == sorted(whole)
    assert len(parts[0][0]) == len(parts[1][0]) == 4
    assert {told for _, told in parts} == {valid}
