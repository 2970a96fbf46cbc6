"""CodeGen: GPT-J with a fused projection; the scores are `_attn`, which is all that is replaced."""

from __future__ import annotations

import torch.nn as nn
from transformers.models.codegen.modeling_codegen import CodeGenAttention

from clearhead.hf.replace.base import ScoresOfGPTJ


class ClearheadCodeGenAttention(ScoresOfGPTJ, CodeGenAttention):
    """`CodeGenAttention` with the patched attention."""

    is_causal = True


CLASSES: dict[str, type[nn.Module]] = {"CodeGenAttention": ClearheadCodeGenAttention}
