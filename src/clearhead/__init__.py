"""clearhead: find where a transformer loses its signal, fix it in one line, and prove that the fix helped.

    import clearhead as ch
    from clearhead import functional as F
    out = F.laser_attention(q, k, v, is_causal=True)

Names are imported on first use, so that importing the package costs nothing.
"""

from clearhead._lazy import attach

__version__ = "0.1.0.dev0"

__getattr__, __dir__ = attach(
    __name__,
    {
        "functional": "clearhead.functional:",
        "signal": "clearhead.signal:",
        "hf": "clearhead.hf:",
        "torch": "clearhead.torch:",
        "AttentionSpec": "clearhead.attention.spec:AttentionSpec",
        "AttentionOutput": "clearhead.attention.attend:AttentionOutput",
        "Temperatures": "clearhead.attention.selective:Temperatures",
        "Mask": "clearhead.attention.mask:Mask",
        "ALiBi": "clearhead.attention.bias:ALiBi",
        "DenseBias": "clearhead.attention.bias:DenseBias",
        "attend": "clearhead.attention.attend:attend",
        "explain": "clearhead.attention.explain:explain",
        "KVCache": "clearhead.memory.cache:KVCache",
        "ModelConfig": "clearhead.models.config:ModelConfig",
        "build_model": "clearhead.models.make:build_model",
        "Decoder": "clearhead.models.decoder:Decoder",
        "Encoder": "clearhead.models.encoder:Encoder",
        "FeedbackDecoder": "clearhead.models.feedback:FeedbackDecoder",
        "Seq2Seq": "clearhead.models.seq2seq:Seq2Seq",
        "beam_search": "clearhead.models.beam:beam_search",
        "init_": "clearhead.init.apply:init_",
        "load_model": "clearhead.models.io:load_model",
        "save_model": "clearhead.models.io:save_model",
    },
)
