"""What the Hugging Face recipes share: arguments, a model with its blocks of tokens, and a plain training loop."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def arguments(about: str | None, learning_rate: float) -> argparse.Namespace:
    """Options of a recipe; `learning_rate` is the default for what it trains beside temperatures, or for these."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="folder or name of a causal LM; tiny = a random one, for a try")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="UTF-8 text to fine-tune on")
    parser.add_argument("--folder", type=Path, default=Path("runs/hf"), help="where the trained model goes")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=128, help="tokens of a block")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=learning_rate)
    parser.add_argument("--temperature-lr", type=float, default=1e-2, help="steps for values that start at 0")
    return parser.parse_args()


def load(options: argparse.Namespace) -> tuple[Any, Tensor, Tensor]:
    """The plain model, and blocks [n, length] to train on and to hold out (the last tenth of the text)."""
    import transformers

    torch.manual_seed(0)
    text = options.text.read_text(encoding="utf-8")
    if options.model == "tiny":
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model: Any = transformers.LlamaForCausalLM(config)
        tokens = list(text.encode())
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model)
        tokens = transformers.AutoTokenizer.from_pretrained(options.model)(text)["input_ids"]
    blocks = torch.tensor(tokens[: len(tokens) // options.length * options.length]).view(-1, options.length)
    held_out = max(1, len(blocks) // 10)
    if len(blocks) <= held_out:
        raise SystemExit(f"{options.text}: {len(tokens)} tokens make {len(blocks)} blocks; give more text")
    return model, blocks[:-held_out], blocks[-held_out:]


@torch.no_grad()
def loss_of(model: Any, blocks: Tensor) -> float:
    """Mean loss per token on held-out blocks."""
    model.eval()
    return sum(model(input_ids=block[None], labels=block[None]).loss.item() for block in blocks) / len(blocks)


def train(model: Any, groups: Iterable[dict[str, Any]], blocks: Tensor, options: argparse.Namespace) -> None:
    """AdamW over `groups`, with a linear way up over a tenth of the steps and a linear way down."""
    optimizer = torch.optim.AdamW(list(groups), betas=(0.9, 0.95))
    up = max(1, options.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / up, (options.steps - step) / max(1, options.steps - up))
    )
    model.train()
    for step in range(options.steps):
        batch = blocks[torch.randint(len(blocks), (options.batch,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)
