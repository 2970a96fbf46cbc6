"""How the parts of a transformer are called in the world. Compared in lower case, without underscores."""

from __future__ import annotations

QUERY = {
    "q",
    "query",
    "qproj",
    "qlin",
    "wq",
    "toq",
    "queryproj",
    "linearq",
    "qlinear",
    "projq",
    "fcq",
    "queries",
    "qattn",
}
KEY = {name.replace("query", "key").replace("queries", "keys").replace("q", "k") for name in QUERY}
VALUE = {name.replace("query", "value").replace("queries", "values").replace("q", "v") for name in QUERY}
FUSED = {"cattn", "qkv", "querykeyvalue", "qkvproj", "wqkv", "inproj", "toqkv", "projqkv", "qkvlinear", "tokqv"}
FUSED_KEY_VALUE = {"cattn", "kv", "kvproj", "tokv", "wkv", "keyvalue"}
ATTENTION_OUTPUT = {
    "o", "out", "output", "outproj", "oproj", "outlin", "cproj", "dense", "wo", "toout", "toout.0", "proj", "projo",
    "projout", "linearout", "outputproj", "fco", "output.dense", "olinear", "outlinear",
}  # fmt: skip
UP = {
    "up", "upproj", "fc1", "cfc", "fcin", "lin1", "linear1", "wi", "w1", "dense1", "denseh4h", "denseht4h",
    "densehto4h", "intermediate.dense", "intermediatedense", "ffn", "linup", "wi1", "w3", "dense", "fcup", "expand",
}  # fmt: skip
DOWN = {
    "down", "downproj", "fc2", "cproj", "fcout", "lin2", "linear2", "wo", "w2", "dense2", "dense4htoh", "output.dense",
    "outputdense", "ffnoutput", "lindown", "fcdown", "contract",
}  # fmt: skip
GATE = {"gate", "gateproj", "wi0", "w1", "lingate", "fcgate", "wgate", "gatelinear"}
FUSED_GATE_UP = {"gateupproj", "wi", "w12", "gateup", "fc1"}
"""One matrix for both, the gate's rows first; known by its size, twice what `down` reads."""

CROSS = ("cross", "encoderattn", "encdec", "multiheadattn", "contextattn", "srcattn", "attn2")

ATTENTION_NORM = {
    "ln1", "inputlayernorm", "layernormbefore", "layernorm1", "norm1", "attnnorm", "attentionnorm", "lnattn", "lnatt",
    "selfattnlayernorm", "selfattentionlayernorm", "preattnnorm", "salayernorm", "lnsa", "norms.0",
    "attentionlayernorm", "normattn", "prenorm1", "attnln", "selfattnnorm", "norma",
}  # fmt: skip
CROSS_NORM = {"encoderattnlayernorm", "lncrossattn", "crossattnnorm", "crossnorm", "lncross", "crossattentionnorm"}
FEED_FORWARD_NORM = {
    "ln2", "postattentionlayernorm", "layernormafter", "layernorm2", "norm2", "mlpnorm", "ffnnorm", "lnmlp", "ffnorm",
    "finallayernorm", "prefeedforwardlayernorm", "outputlayernorm", "fulllayerlayernorm", "feedforwardnorm", "lnff",
    "normff", "normmlp", "prenorm2", "mlpln", "lnffn", "norms.1", "normb",
}  # fmt: skip

TOKEN_TABLE = ("word", "tok", "wte", "embedin", "shared", "emb", "wordembeddings")
POSITION_TABLE = ("pos", "wpe")
SEGMENT_TABLE = ("type", "segment")
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "nhead", "nheads", "h")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "n_kv_head", "num_kv_head")
HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "d_kv", "key_value_proj_dim", "dim_head", "d_head", "d_k")
SCALES = ("scaling", "scale", "softmax_scale", "scale_factor")
HEAD_MATRIX = (
    "lm_head", "head", "output", "to_logits", "classifier", "generator", "unembed", "out", "proj_out", "fc_out",
    "decoder", "out_proj", "output_projection", "score", "fc", "lm_head.decoder",
)  # fmt: skip


def plain(name: str) -> str:
    """The name as the tables above have it."""
    return name.lower().replace("_", "")
