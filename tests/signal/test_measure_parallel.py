"""Two processes over gloo: inside DDP, sharded by FSDP2, and in a sharded training run."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from clearhead.models.config import PRESETS
from clearhead.models.make import build_model
from clearhead.signal.measurement import measure
from clearhead.signal.trace import Trace

TINY = dataclasses.replace(PRESETS["tiny"], width=32, vocab_size=97)


def batch(rank: int) -> torch.Tensor:
    return torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(rank))


def model_in(mode: str) -> nn.Module:
    model = build_model(TINY).eval()
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)
    return model


def main(mode: str, folder: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = model_in(mode)
    model(batch(rank)).sum().backward()  # gradients of a user's, to be left alone
    parts = [getattr(p.grad, "to_local", lambda p=p: p.grad)() for p in model.parameters()]
    before = [part.clone() for part in parts]
    trace = measure(model, batch(rank))
    after = [getattr(p.grad, "to_local", lambda p=p: p.grad)() for p in model.parameters()]
    kept = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    model(batch(rank)).sum().backward()  # the wrapper still works
    twice = [getattr(p.grad, "to_local", lambda p=p: p.grad)() for p in model.parameters()]
    works = all(torch.allclose(a, 2 * b, rtol=1e-4, atol=1e-5) for a, b in zip(twice, before, strict=True))
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules() if "Attention" in type(m).__name__)
    said = {"trace": trace.to_dict(), "kept": kept, "works": works, "hooks": hooks}
    (folder / f"{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.full
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes(tmp_path: Path, mode: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, __file__, mode, str(tmp_path)],
        capture_output=True, text=True, timeout=180, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    single = build_model(TINY).eval()
    alone = [measure(single, batch(rank)) for rank in range(2)]
    gradients = []
    for rank in range(2):
        (g,) = torch.autograd.grad(_loss(single, batch(rank)), [single.blocks[1].attention.value.weight])  # type: ignore[union-attr, list-item]
        gradients.append(g)
    for rank in range(2):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert said["kept"]
        assert said["works"]
        assert said["hooks"] == 0
        trace = Trace.from_dict(said["trace"])
        assert f"measured on rank {rank} of 2, on its own batch" in trace.notes
        for tap in alone[rank]:
            found = trace[tap.name]
            assert found.forward is not None
            assert found.forward.variance == pytest.approx(tap.forward.variance, rel=1e-5)  # type: ignore[union-attr]
            assert found.backward is not None
            assert found.backward.variance == pytest.approx(tap.backward.variance, rel=1e-4)  # type: ignore[union-attr]
            assert (found.attention is None) == (tap.attention is None)
        norm = trace["decoder.1.attention.branch"].matrix_gradients["value"]
        # DDP is looked through: this rank's own gradient. FSDP's is the mean over ranks, the only one there is.
        wanted = gradients[rank] if mode == "ddp" else (gradients[0] + gradients[1]) / 2
        assert norm == pytest.approx(float(wanted.norm()), rel=1e-3)


def _loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
