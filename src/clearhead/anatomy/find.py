"""`anatomy_of`: which module of a model plays which part."""

from __future__ import annotations

import torch.nn as nn

from clearhead.anatomy import clearhead, hugging_face, timm, torch_layers
from clearhead.anatomy.parts import Anatomy
from clearhead.anatomy.rules import Rules
from clearhead.anatomy.stacks import assemble
from clearhead.errors import UserError
from clearhead.layers.feedback import FeedbackBlock


def anatomy_of(model: nn.Module) -> Anatomy:
    """Describe a transformer as references into it; nothing is changed.

    Recognised: clearhead's own models; Hugging Face (GPT-2, GPT-Neo, GPT-J, GPT-NeoX, OPT, Llama, Mistral, Qwen, Gemma,
    Phi, OLMo 2, BLOOM, Falcon, BERT, RoBERTa, DistilBERT, ELECTRA, DeBERTa, ModernBERT, T5, BART, Marian, Whisper, ViT
    and whatever is built and named like them); timm's vision transformers; torch.nn.Transformer*; and any module with
    repeated blocks whose matrices are called like queries, keys and values (`clearhead.anatomy.names`). Wrappers of DDP
    and torch.compile are looked through. What was assumed stands in `Anatomy.notes`, parameters without a part in
    `Anatomy.unknown`.

    Raises `UserError`, one line, when no attention is found, and for a model inside the old
    FullyShardedDataParallel, which hides the parameters (use `fully_shard`), and for a Feedback Transformer.
    """
    model = unwrap(model)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UserError(
            "FullyShardedDataParallel flattens the parameters away; shard the model with fully_shard (FSDP2), or hand "
            "over the model before it is wrapped"
        )
    if any(isinstance(module, FeedbackBlock) for module in model.modules()):
        raise UserError(
            "architecture=feedback runs its blocks once a token and its layers look at a mixture of all layers: no "
            "theory and no measurement here fits it; inspect a decoder of the same shape instead"
        )
    found = clearhead.recognise(model)
    if found is None:
        found = assemble(model, _rules(model))
    if found is None:
        raise UserError(
            f"no attention found in {type(model).__name__}: no module holds matrices named like query, key and value "
            f"(or one for all three) and an output"
        )
    return found


def _rules(model: nn.Module) -> Rules:
    if hugging_face.recognises(model):
        return hugging_face.HuggingFaceRules(model)
    if timm.recognises(model):
        return timm.TimmRules(model)
    if torch_layers.recognises(model):
        return torch_layers.TorchRules(model)
    return Rules(model)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of DDP and torch.compile. FSDP2 wraps nothing: it shards a model in place."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif model._modules.get("_orig_mod") is not None:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model
