"""Buffers that outlive a call are never shared by two, and never seen by another kind of number or mode."""

from __future__ import annotations

import threading

import torch

from clearhead import attend
from clearhead.attention.mask import Mask
from clearhead.kernels.rule import Scratch


def test_two_at_once_never_share_and_the_next_one_does() -> None:
    like = torch.zeros(())
    first, second = Scratch("test"), Scratch("test")
    held = first.take("x", (8,), like).fill_(1.0)
    assert held.data_ptr() != second.take("x", (8,), like).fill_(2.0).data_ptr()
    assert held.eq(1.0).all()
    place = held.data_ptr()
    del second, first
    assert Scratch("test").take("x", (4,), like).data_ptr() == place


def test_another_dtype_owner_or_thread_gets_its_own() -> None:
    first = Scratch("test")
    place = first.take("x", (8,), torch.zeros(())).data_ptr()
    del first
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(Scratch("test").take("x", (8,), torch.zeros(())).data_ptr()))
    thread.start()
    thread.join()
    assert found[0] != place
    assert Scratch("other").take("x", (8,), torch.zeros(())).data_ptr() != place
    assert Scratch("test").take("x", (8,), torch.zeros((), dtype=torch.float64)).dtype == torch.float64


def test_large_ones_go_with_their_call() -> None:
    first = Scratch("large")
    first.take("x", (Scratch.KEPT + 1,), torch.zeros(()))
    first.take("y", (Scratch.KEPT,), torch.zeros(()))
    del first
    assert list(Scratch("large")._held) == ["y"]


def test_buffers_made_in_inference_mode_serve_training_afterwards() -> None:
    q, k, v = (torch.randn(1, 2, 48, 8) for _ in range(3))
    expected = attend(q, k, v, "self_adjust", mask=Mask.causal(), backend="reference").out
    with torch.inference_mode():
        attend(q.double(), k.double(), v.double(), "self_adjust", mask=Mask.causal())  # others' buffers do not fit
        attend(q, k, v, "self_adjust", mask=Mask.causal())
    q.requires_grad_()
    out = attend(q, k, v, "self_adjust", mask=Mask.causal()).out
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    assert q.grad is not None


def test_the_output_is_not_a_buffer() -> None:
    q, k, v = (torch.randn(1, 2, 48, 8) for _ in range(3))
    for spec in ("self_adjust", "softmax"):
        first = attend(q, k, v, spec, backend="chunked").out
        kept = first.clone()
        attend(2 * q, k, v, spec, backend="chunked")
        attend(2 * q[:, :, :1], k, v, spec, backend="chunked")
        assert torch.equal(first, kept)
