from __future__ import annotations

import pytest
import torch

from clearhead.objectives.causal_lm import causal_lm_loss


def test_sums_nats_over_valid_tokens_only():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([[1, -100, 6], [-100, -100, 0]])
    total, count = causal_lm_loss(logits, targets)
    log_p = logits.log_softmax(-1)
    assert total.item() == pytest.approx(-(log_p[0, 0, 1] + log_p[0, 2, 6] + log_p[1, 2, 0]).item())
    assert count.item() == 3


def test_micro_batches_add_up_to_the_batch():
    logits = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 7, (4, 3), generator=torch.Generator().manual_seed(1))
    targets[0, :2] = -100
    whole = causal_lm_loss(logits, targets)
    parts = [causal_lm_loss(*half) for half in ((logits[:2], targets[:2]), (logits[2:], targets[2:]))]
    torch.testing.assert_close(whole[0], parts[0][0] + parts[1][0])
    assert whole[1] == parts[0][1] + parts[1][1]


def test_nothing_valid_is_zero_and_bf16_is_summed_in_fp32():
    total, count = causal_lm_loss(torch.randn(1, 2, 5).bfloat16(), torch.full((1, 2), -100))
    assert (total.item(), count.item()) == (0.0, 0)
    assert total.dtype == torch.float32


def test_refuses_targets_of_another_shape():
    with pytest.raises(ValueError, match=r"expected targets of shape \(1, 3\)"):
        causal_lm_loss(torch.zeros(1, 3, 5), torch.zeros(1, 2, dtype=torch.long))
