"""Label smoothing: equal to torch's, by hand, and the plain nats beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clearhead.objectives.seq2seq import seq2seq_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothed_equals_torch_and_plain_stays_plain(smoothing):
    logits = torch.randn(3, 5, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (3, 5))
    targets[1, 2:] = -100
    smoothed, nats, count = seq2seq_loss(logits, targets, smoothing=smoothing)
    flat = (logits.flatten(0, 1), targets.flatten())
    expected = F.cross_entropy(*flat, ignore_index=-100, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(smoothed, expected)
    torch.testing.assert_close(nats.detach(), F.cross_entropy(*flat, ignore_index=-100, reduction="sum").detach())
    assert count.item() == 12
    (gradient,) = torch.autograd.grad(smoothed, logits)
    assert (gradient[1, 2:] == 0).all()


def test_by_hand():
    logits = torch.randn(1, 1, 4, dtype=torch.float64)
    log_p = logits.log_softmax(-1)[0, 0]
    smoothed, nats, _ = seq2seq_loss(logits, torch.tensor([[2]]), smoothing=0.1)
    assert smoothed.item() == pytest.approx((-0.9 * log_p[2] - 0.1 * log_p.mean()).item())
    assert nats.item() == pytest.approx(-log_p[2].item())


def test_half_precision_is_summed_in_fp32_and_bad_arguments_are_named():
    logits, targets = torch.randn(2, 3, 7).bfloat16(), torch.randint(0, 7, (2, 3))
    assert all(t.dtype == torch.float32 for t in seq2seq_loss(logits, targets, smoothing=0.1)[:2])
    with pytest.raises(ValueError, match=r"smoothing in \[0, 1\), got 1.0"):
        seq2seq_loss(logits, targets, smoothing=1.0)
    with pytest.raises(ValueError, match="seq2seq_loss: expected targets of shape"):
        seq2seq_loss(logits, targets[:1])
