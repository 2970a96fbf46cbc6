"""Run by test_sharded.py in two processes: a patched model under `fully_shard` beside the same model whole."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from clearhead.hf.temperatures import temperature_parameters
from tests.hf.patched import ids, selective


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    whole, model, tokens = selective("llama").float(), selective("llama").float(), ids(4, 8)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    own = temperature_parameters(model)
    assert own
    assert all(isinstance(p, DTensor) for p in own.values())

    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (whole, model)]
    half = tokens[2 * dist.get_rank() :][:2]
    torch.testing.assert_close(model(half).logits, whole(half).logits, rtol=1e-5, atol=1e-6)
    for each, batch, optimizer in zip((whole, model), (tokens, half), optimizers, strict=True):
        each(batch, labels=batch).loss.backward()
        optimizer.step()
    for name, parameter in temperature_parameters(whole).items():
        sharded = own[name]
        assert isinstance(sharded, DTensor)
        torch.testing.assert_close(sharded.full_tensor(), parameter.detach(), rtol=1e-4, atol=1e-6)

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
        torch.save(whole(tokens).logits.detach(), f"{folder}/want.pt")
    dist.barrier()
    dist.destroy_process_group()
    os.write(sys.stdout.fileno(), b"same\n")


if __name__ == "__main__":
    main(sys.argv[1])
