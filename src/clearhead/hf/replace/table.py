"""Which architectures are replaced, by the folder of transformers that they live in, and which are refused and why."""

from __future__ import annotations

REPLACED = frozenset(
    {
        "big_bird",
        "bloom",
        "codegen",
        "falcon",
        "gpt_neo",
        "gptj",
        "imagegpt",
        "megatron_bert",
        "mpnet",
        "mpt",
        "openai",
        "rembert",
        "roformer",
        "swinv2",
        "wavlm",
        "xglm",
    }
)
"""Each has a file of its name in this folder."""

_DISENTANGLED = (
    "its scores add products of queries and keys with learned embeddings of their distance (disentangled attention), "
    "which no bias that is known before the queries can stand for"
)
_PIECES = (
    "its attention cuts the sequence into overlapping windows beside global tokens that have projections of their own, "
    "so a query has two kinds of scores"
)
REFUSED: dict[str, str] = {
    "deberta": _DISENTANGLED,
    "deberta_v2": _DISENTANGLED,
    "xlnet": "its scores add products of queries with embeddings of the distance, and it reads two streams at a time",
    "transfo_xl": "its scores add products of queries with embeddings of the distance",
    "funnel": "its scores add products of queries with embeddings of the distance, and its queries are pooled",
    "longformer": _PIECES,
    "led": _PIECES,
    "reformer": "it sorts keys into buckets by hashing, and shares queries and keys",
    "nystromformer": "it reads through landmarks and never makes the scores that a spec is about",
    "yoso": "it reads through hashing and never makes the scores that a spec is about",
    "mra": "it approximates the scores block by block and never makes those that a spec is about",
    "bigbird_pegasus": "its encoder's block-sparse attention is a file of its own, which nothing here replaces yet",
}
