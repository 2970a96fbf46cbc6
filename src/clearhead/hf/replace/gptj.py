"""GPT-J: rotary positions and a cache of its own; the scores are `_attn`, which is all that is replaced."""

from __future__ import annotations

import torch.nn as nn
from transformers.models.gptj.modeling_gptj import GPTJAttention

from clearhead.hf.replace.base import ScoresOfGPTJ


class ClearheadGPTJAttention(ScoresOfGPTJ, GPTJAttention):
    """`GPTJAttention` with the patched attention."""


CLASSES: dict[str, type[nn.Module]] = {
    "GPTJAttention": ClearheadGPTJAttention,
    "GPTJFlashAttention2": ClearheadGPTJAttention,
}
