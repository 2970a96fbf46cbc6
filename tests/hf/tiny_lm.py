"""A tiny random Llama with a tokenizer of its own, saved as transformers saves one, and a text to fine-tune it on."""

from __future__ import annotations

import random
from pathlib import Path

import torch

POSITIONS = 64


def write_texts(folder: Path, *, documents: int = 10) -> Path:
    """A folder of short documents of made-up words."""
    folder.mkdir(parents=True)
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(40)]
    for number in range(documents):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words, k=250 + 40 * number)), encoding="utf-8")
    return folder


def write_model(folder: Path, texts: Path, *, seed: int = 0) -> Path:
    """A Llama of two layers, and byte pairs learned from `texts`, its separator in the middle of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|start|>", "<|endoftext|>"],
        show_progress=False,
    )
    library.train([str(path) for path in sorted(texts.iterdir())], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<|start|>", eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=304,  # padded, as most are
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
