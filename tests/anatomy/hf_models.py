"""Tiny random models of Hugging Face, made from configs: nothing is downloaded. Width 32, 2 layers, 4 heads, 97 ids."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

WIDTH, LAYERS, HEADS, HIDDEN, VOCABULARY = 32, 2, 4, 64, 97

_NAMED = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_LLAMA = _NAMED | {
    "intermediate_size": HIDDEN,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = _NAMED | {"intermediate_size": HIDDEN, "max_position_embeddings": 66}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "pad_token_id": 0,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "bos_token_id": 1,
    "decoder_ffn_dim": HIDDEN,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
}
_VIT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "image_size": 16,
    "patch_size": 4,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": HIDDEN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "hidden_size": WIDTH,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", _GPT | {"rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _BERT | {"bos_token_id": 1, "eos_token_id": 2}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        _NAMED | {"ffn_dim": HIDDEN, "max_position_embeddings": 64, "word_embed_proj_dim": WIDTH},
    ),
    "opt-post": (
        "OPTForCausalLM",
        "OPTConfig",
        _NAMED
        | {
            "ffn_dim": HIDDEN,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": WIDTH,
            "do_layer_norm_before": False,
        },
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _LLAMA | {"head_dim": 8}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _LLAMA | {"head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _LLAMA | {"head_dim": 8}),
    "phi": (
        "PhiForCausalLM",
        "PhiConfig",
        _NAMED | {"intermediate_size": HIDDEN, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _LLAMA),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _LLAMA),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
    ),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        _NAMED | {"new_decoder_architecture": True, "num_kv_heads": 2, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _BERT),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": WIDTH,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": HIDDEN,
            "max_position_embeddings": 64,
        },
    ),
    "electra": ("ElectraForPreTraining", "ElectraConfig", _BERT | {"embedding_size": 16}),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "t5-gated": ("T5ForConditionalGeneration", "T5Config", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "bart": ("BartForConditionalGeneration", "BartConfig", _SEQ2SEQ),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", _SEQ2SEQ),
    "marian": ("MarianMTModel", "MarianConfig", _SEQ2SEQ | {"scale_embedding": True}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {name: value for name, value in _SEQ2SEQ.items() if "forced" not in name and name != "max_position_embeddings"}
        | {
            "max_source_positions": 30,
            "max_target_positions": 30,
            "num_mel_bins": 8,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", _VIT),
}

PLACEMENT = {name: "pre" for name in MODELS} | dict.fromkeys(
    ("opt-post", "bert", "roberta", "distilbert", "electra", "bart", "marian"), "post"
)


def build(name: str, **changes: Any) -> nn.Module:
    """The model, in training mode, from seed 0."""
    import transformers

    transformers.logging.set_verbosity_error()
    kind, config, values = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**values | changes)).train()


def batch_for(name: str) -> dict[str, torch.Tensor]:
    """Three sequences of 12, 9 and 5 tokens padded on the right; labels where the loss needs them."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    mask[2, 5:] = 0
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 1])}
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 60), "labels": torch.randint(3, VOCABULARY, (2, 7))}
    if name in ("t5", "t5-gated", "bart", "mbart", "marian"):
        labels = torch.randint(3, VOCABULARY, (3, 7))
        labels[1, 4:] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if name in ("bert", "roberta", "distilbert"):
        labels = torch.full_like(ids, -100)
        labels[:, 1] = 5
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {"input_ids": ids, "attention_mask": mask}
