"""The configurations of the zoo (`zoo.py`): tiny random models of transformers, by architecture. Nothing is downloaded.

Width 32, 2 layers, 4 heads, 97 ids, as far as an architecture allows. A name is transformers' own `model_type`, with a
suffix where one type hides several attentions (`falcon-alibi`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

WIDTH, LAYERS, HEADS, HIDDEN, VOCABULARY, HEAD_DIM = 32, 2, 4, 64, 97, 8

Kind = Literal["decoder", "encoder", "seq2seq", "vision", "speech"]
Values = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One architecture: its classes in transformers and the values of a tiny config.

    `attentions` counts the layers of attention that a patch must reach; a count of its own, so that a patch cannot
    agree with itself.
    """

    name: str
    kind: Kind
    model: str
    config: str
    values: Mapping[str, Any]
    attentions: int = LAYERS
    extra: bool = False
    """A variant for tests of one thing, no row of the table."""


_NAMED: Values = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
_LLAMA = _NAMED | {
    "intermediate_size": HIDDEN,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA_8 = _LLAMA | {"head_dim": HEAD_DIM}
_SHORT_WINDOW = {"sliding_window": 6}  # shorter than the inputs, so that a window that is dropped shows
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_BERT = _NAMED | {"intermediate_size": HIDDEN, "max_position_embeddings": 66}
_GPT: Values = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SEQ2SEQ: Values = {
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
_WHISPER = {
    name: value for name, value in _SEQ2SEQ.items() if "forced" not in name and name != "max_position_embeddings"
} | {
    "max_source_positions": 30,
    "max_target_positions": 30,
    "num_mel_bins": 8,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_VIT: Values = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "image_size": 16,
    "patch_size": 4,
}
_SWIN: Values = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
}
_T5: Values = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": HEAD_DIM,
    "d_ff": HIDDEN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
}
# Layer norms in the feature extractor: with a group norm over time, padding is not invisible to any attention.
_WAV: Values = _NAMED | {
    "intermediate_size": HIDDEN,
    "conv_dim": [16, 16],
    "conv_kernel": [4, 4],
    "conv_stride": [4, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "layerdrop": 0.0,
}
_FALCON = _NAMED | {"bos_token_id": 1, "eos_token_id": 2}
_OPT = _NAMED | {"ffn_dim": HIDDEN, "max_position_embeddings": 64, "word_embed_proj_dim": WIDTH}
_GPT_NEO: Values = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "hidden_size": WIDTH,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BIG_BIRD = _BERT | {"block_size": 2, "num_random_blocks": 1}

SEQ2SEQ_LAYERS = 3 * LAYERS


def _make() -> list[Entry]:
    made: list[Entry] = []

    def add(kind: Kind, name: str, model: str, config: str, values: Values, count: int | None = None) -> None:
        most = SEQ2SEQ_LAYERS if kind == "seq2seq" else LAYERS
        made.append(Entry(name, kind, model, config, values, most if count is None else count))

    def decoder(name: str, stem: str, values: Values, model: str | None = None, count: int | None = None) -> None:
        add("decoder", name, model or f"{stem}ForCausalLM", f"{stem}Config", values, count)

    def encoder(name: str, stem: str, values: Values, model: str | None = None, count: int | None = None) -> None:
        add("encoder", name, model or f"{stem}ForMaskedLM", f"{stem}Config", values, count)

    def seq2seq(name: str, stem: str, values: Values, model: str | None = None, count: int | None = None) -> None:
        add("seq2seq", name, model or f"{stem}ForConditionalGeneration", f"{stem}Config", values, count)

    def other(kind: Kind, name: str, stem: str, values: Values, config: str | None = None, count: int = LAYERS) -> None:
        add(kind, name, f"{stem}Model", config or f"{stem}Config", values, count)

    # -- decoders ---------------------------------------------------------------------------------------------------
    decoder("gpt2", "GPT2", _GPT, "GPT2LMHeadModel")
    decoder("gpt_neo", "GPTNeo", _GPT_NEO)
    decoder("gptj", "GPTJ", _GPT | {"rotary_dim": 4})
    decoder("gpt_neox", "GPTNeoX", _BERT | {"bos_token_id": 1, "eos_token_id": 2})
    decoder("gpt_bigcode", "GPTBigCode", _GPT)
    decoder("codegen", "CodeGen", _GPT | {"rotary_dim": 4})
    decoder("opt", "OPT", _OPT)
    decoder("bloom", "Bloom", {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS})
    decoder("mpt", "Mpt", {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS,
                           "max_seq_len": 64})  # fmt: skip
    decoder("falcon", "Falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2})
    decoder("falcon-alibi", "Falcon", _FALCON | {"alibi": True, "multi_query": False, "bias": True})
    decoder("falcon-multi-query", "Falcon", _FALCON | {"multi_query": True})
    decoder("llama", "Llama", _LLAMA)
    decoder("mistral", "Mistral", _LLAMA | _SHORT_WINDOW)
    decoder("mixtral", "Mixtral", _LLAMA | _LOCAL_EXPERTS | _SHORT_WINDOW)
    decoder("qwen2", "Qwen2", _LLAMA)
    decoder("qwen2_moe", "Qwen2Moe", _LLAMA | _MOE | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1})
    decoder("qwen3", "Qwen3", _LLAMA_8)
    decoder("qwen3_moe", "Qwen3Moe", _LLAMA_8 | _MOE)
    decoder("gemma", "Gemma", _LLAMA_8)
    decoder("gemma2", "Gemma2", _LLAMA_8 | _SHORT_WINDOW)
    decoder("gemma3_text", "Gemma3Text", _LLAMA_8 | _SHORT_WINDOW | {
        "layer_types": ["sliding_attention", "full_attention"]}, "Gemma3ForCausalLM")  # fmt: skip
    decoder("phi", "Phi", _NAMED | {"intermediate_size": HIDDEN, "bos_token_id": 1, "eos_token_id": 2})
    decoder("phi3", "Phi3", _LLAMA)
    decoder("phimoe", "Phimoe", _LLAMA | _LOCAL_EXPERTS)
    decoder("olmo", "Olmo", _LLAMA)
    decoder("olmo2", "Olmo2", _LLAMA)
    decoder("olmo3", "Olmo3", _LLAMA | _SHORT_WINDOW | {"layer_types": ["sliding_attention", "full_attention"]})
    decoder("olmoe", "Olmoe", _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2})
    decoder("cohere", "Cohere", _LLAMA)
    decoder("cohere2", "Cohere2", _LLAMA | _SHORT_WINDOW | {"layer_types": ["sliding_attention", "full_attention"]})
    decoder("stablelm", "StableLm", _LLAMA)
    decoder("starcoder2", "Starcoder2", _LLAMA | _SHORT_WINDOW)
    decoder("granite", "Granite", _LLAMA | {"attention_multiplier": 0.3})
    decoder("smollm3", "SmolLM3", _LLAMA | {"no_rope_layers": [1, 0]})
    decoder("gpt_oss", "GptOss", _LLAMA_8 | _LOCAL_EXPERTS | _SHORT_WINDOW)
    decoder("glm", "Glm", _LLAMA_8)
    decoder("glm4", "Glm4", _LLAMA_8)
    decoder("helium", "Helium", _LLAMA_8)
    decoder("nemotron", "Nemotron", _LLAMA)
    decoder("persimmon", "Persimmon", _NAMED | {"intermediate_size": HIDDEN})
    decoder("arcee", "Arcee", _LLAMA)
    decoder("ernie4_5", "Ernie4_5", _LLAMA_8)
    decoder("exaone4", "Exaone4", _LLAMA | _SHORT_WINDOW | {"layer_types": ["sliding_attention", "full_attention"]})
    decoder("deepseek_v3", "DeepseekV3", _NAMED | {
        "intermediate_size": HIDDEN, "moe_intermediate_size": 32, "num_key_value_heads": HEADS, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1})  # fmt: skip
    decoder("xglm", "XGLM", {"vocab_size": VOCABULARY, "d_model": WIDTH, "num_layers": LAYERS,
                             "attention_heads": HEADS, "ffn_dim": HIDDEN, "max_position_embeddings": 64})  # fmt: skip
    decoder("openai-gpt", "OpenAIGPT", _GPT, "OpenAIGPTLMHeadModel")
    decoder("imagegpt", "ImageGPT", _GPT, "ImageGPTForCausalImageModeling")
    decoder("biogpt", "BioGpt", _BERT)

    # -- encoders ---------------------------------------------------------------------------------------------------
    encoder("bert", "Bert", _BERT)
    encoder("roberta", "Roberta", _BERT)
    encoder("camembert", "Camembert", _BERT)
    encoder("xlm-roberta", "XLMRoberta", _BERT)
    encoder("distilbert", "DistilBert", {"vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS,
                                         "hidden_dim": HIDDEN, "max_position_embeddings": 64})  # fmt: skip
    encoder("albert", "Albert", _BERT | {"embedding_size": 16}, count=1)  # two layers share one module
    encoder("electra", "Electra", _BERT | {"embedding_size": 16}, "ElectraForPreTraining")
    encoder("mpnet", "MPNet", _BERT)
    encoder("modernbert", "ModernBert", _BERT | {
        "local_attention": 8, "global_attn_every_n_layers": 2, "pad_token_id": 0, "cls_token_id": 1,
        "sep_token_id": 2})  # fmt: skip
    encoder("esm", "Esm", _BERT | {"pad_token_id": 1, "mask_token_id": 2, "position_embedding_type": "rotary"})
    encoder("roformer", "RoFormer", _BERT | {"embedding_size": WIDTH})
    encoder("megatron-bert", "MegatronBert", _BERT)
    encoder("rembert", "RemBert", _BERT | {"input_embedding_size": 16, "output_embedding_size": 16})
    encoder("deberta", "Deberta", _BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]})
    encoder("deberta-v2", "DebertaV2", _BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]})
    encoder("xlnet", "XLNet", {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layer": LAYERS, "n_head": HEADS,
                               "d_inner": HIDDEN}, "XLNetLMHeadModel")  # fmt: skip
    encoder("big_bird", "BigBird", _BIG_BIRD)
    encoder("big_bird-full", "BigBird", _BIG_BIRD | {"attention_type": "original_full"})
    encoder("longformer", "Longformer", _BERT | {"attention_window": 8})
    encoder("funnel", "Funnel", {
        "vocab_size": VOCABULARY, "d_model": WIDTH, "n_head": HEADS, "d_head": HEAD_DIM, "d_inner": HIDDEN,
        "block_sizes": [1, 1], "num_decoder_layers": 1}, count=3)  # fmt: skip

    # -- encoder-decoders ---------------------------------------------------------------------------------------------
    seq2seq("t5", "T5", _T5)
    seq2seq("mt5", "MT5", _T5)
    seq2seq("umt5", "UMT5", _T5)
    seq2seq("bart", "Bart", _SEQ2SEQ)
    seq2seq("mbart", "MBart", _SEQ2SEQ)
    seq2seq("pegasus", "Pegasus", _SEQ2SEQ)
    seq2seq("marian", "Marian", _SEQ2SEQ | {"scale_embedding": True}, "MarianMTModel")
    seq2seq("m2m_100", "M2M100", _SEQ2SEQ)
    seq2seq("blenderbot", "Blenderbot", _SEQ2SEQ)
    seq2seq("led", "LED", {name: v for name, v in _SEQ2SEQ.items() if name != "max_position_embeddings"} | {
        "attention_window": 8, "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64})  # fmt: skip
    seq2seq("whisper", "Whisper", _WHISPER)

    # -- images -----------------------------------------------------------------------------------------------------
    add("vision", "vit", "ViTForImageClassification", "ViTConfig", _VIT)
    other("vision", "deit", "DeiT", _VIT)
    other("vision", "beit", "Beit", _VIT | {"use_relative_position_bias": True})
    other("vision", "dinov2", "Dinov2", _VIT)
    other("vision", "swin", "Swin", _SWIN)
    other("vision", "swinv2", "Swinv2", _SWIN)
    other("vision", "siglip_vision_model", "SiglipVision", _VIT | {"vision_use_head": False})
    other("vision", "siglip_vision_model-pooled", "SiglipVision", _VIT, count=3)
    other("vision", "clip_vision_model", "CLIPVision", _VIT)
    other("vision", "vit_msn", "ViTMSN", _VIT)
    other("vision", "ijepa", "IJepa", _VIT)

    # -- sound ------------------------------------------------------------------------------------------------------
    other("speech", "wav2vec2", "Wav2Vec2", _WAV)
    other("speech", "hubert", "Hubert", _WAV)
    other("speech", "wavlm", "WavLM", _WAV | {"num_buckets": 8, "max_bucket_distance": 16})
    return made


def _variants() -> list[Entry]:
    post = _OPT | {"do_layer_norm_before": False}
    gated = _T5 | {"feed_forward_proj": "gated-gelu"}
    return [
        Entry("opt-post", "decoder", "OPTForCausalLM", "OPTConfig", post, extra=True),
        Entry("t5-gated", "seq2seq", "T5ForConditionalGeneration", "T5Config", gated, SEQ2SEQ_LAYERS, extra=True),
    ]


ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _make() + _variants()}
"""By name, in the order of the table."""
