"""A pretrained causal language model as the trainer knows models: `Pretrained`, made of a `PretrainedConfig`.

What learns (LoRA's small matrices, temperatures, or everything) is this module's state dict; the frozen rest is named
by a fingerprint and read from its own folder again. So a checkpoint of a model with 135 million parameters has the size
of what was learned.

Legend: b batch, t tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.attention.spec import Selective
from clearhead.data.pretrained_folder import pretrained_folder, read_causal_config, weights_fingerprint
from clearhead.errors import UserError
from clearhead.hf.lora import add_lora, is_lora
from clearhead.layers.temperature import LearnedTemperatures, SelectiveTemperatures
from clearhead.models.pretrained_config import PretrainedConfig

TEMPERATURES = SelectiveTemperatures | LearnedTemperatures
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DROPS_SEGMENTS = 1e-3
"""Relative error above which a packed document counts as disturbed by its neighbour; a lost mask gives far more."""


class Pretrained(nn.Module):
    """A model of Hugging Face, patched, with what learns beside it. `Pretrained.begin` makes one."""

    def __init__(self, config: PretrainedConfig, model: nn.Module, adapter: Any | None) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self._adapter = [adapter]  # in a list: peft's own view of the same modules is no second child
        self.register_state_dict_post_hook(_keep_what_learns)

    @classmethod
    def begin(cls, config: PretrainedConfig, seed: int = 0) -> Pretrained:
        """Read the model, patch its attention, add what learns; in training mode, LoRA's start drawn from `seed`.

        Raises `UserError`, in one line, for another base than the config names, a folder without a causal language
        model, weights that are incomplete, a context beyond the model's positions, and missing libraries.
        """
        folder = pretrained_folder(config.source)
        read_causal_config(folder)
        found = weights_fingerprint(folder)
        if config.base not in ("", found):
            raise UserError(
                f"{config.source}: the pretrained weights in {folder} are not those that this run began from "
                f"(fingerprint {found}, expected {config.base}); bring them back, or begin another run"
            )
        config = dataclasses.replace(config, base=found)
        model = read_model(folder, DTYPES[config.weights])
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        config.check_context(positions)
        _check_vocabulary(config, model)
        _patch(model, config)
        adapter = add_lora(model, config, seed) if config.tune == "lora" else None
        if adapter is None:  # peft has frozen the rest
            model.requires_grad_(config.tune == "full")
        for module in model.modules():
            if isinstance(module, TEMPERATURES):
                module.requires_grad_(True).to(torch.float32)
        if config.gradient_checkpointing:
            # Renamed in transformers 5.2x, and the old name warns.
            new = getattr(model, "activation_checkpointing_enable", None)
            (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
        made = cls(config, model, adapter)
        made._check_segments()
        return made.train()

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """Return logits, [b, t, V].

        Args:
            tokens: ids, [b, t].
            segments: document numbers, [b, t]; attention stays inside a document and positions begin anew in each.
        """
        packed = {} if segments is None else {"position_ids": positions_in_segments(segments)}
        logits: Tensor = self.model(input_ids=tokens, use_cache=False, **packed).logits
        return logits

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What learns, as groups for `clearhead.train.optimizer.build_optimizer`.

        temperature: no decay, its own rate. lora: no decay (it would pull the model back to the pretrained one).
        matrices and no_decay (norms, biases, embeddings): the model's own, with tune=full.
        """
        groups: dict[str, list[nn.Parameter]] = {"matrices": [], "no_decay": [], "lora": [], "temperature": []}
        temperature = {id(p) for m in self.modules() if isinstance(m, TEMPERATURES) for p in m.parameters()}
        embedded = {id(p) for m in self.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) in temperature:
                groups["temperature"].append(parameter)
            elif is_lora(name):
                groups["lora"].append(parameter)
            elif parameter.dim() < 2 or id(parameter) in embedded:
                groups["no_decay"].append(parameter)
            else:
                groups["matrices"].append(parameter)
        return [
            {
                "name": name,
                "params": params,
                "weight_decay_scale": 1.0 if name == "matrices" else 0.0,
                "lr_scale": self.config.temperature_lr_scale if name == "temperature" else 1.0,
            }
            for name, params in groups.items()
            if params
        ]

    def count_parameters(self) -> dict[str, int]:
        """Parameters: pretrained, temperature, lora, their total, and how many of them learn."""
        counts = {"pretrained": 0, "temperature": 0, "lora": 0}
        temperature = {id(p) for m in self.modules() if isinstance(m, TEMPERATURES) for p in m.parameters()}
        for name, parameter in self.named_parameters():
            part = "temperature" if id(parameter) in temperature else "lora" if is_lora(name) else "pretrained"
            counts[part] += parameter.numel()
        learns = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        return counts | {"total": sum(counts.values()), "trained": learns}

    def flops_per_token(self, context: int) -> float:
        """Floating point operations per token in training at `context` tokens.

            2 W (forward) + 2 W (activations' gradient) + 2 W_learned (weights' gradient) + 3 * 4 * heads * d * keys

        W counts every matrix that multiplies a token (the output matrix too, tied or not), keys is the mean number
        that a query sees, summed over layers. With gradient checkpointing the blocks' forward comes once more. Left out
        is what `ModelConfig`'s count leaves out; and that below the first LoRA matrix no gradient is needed.
        """
        if context < 1:
            raise ValueError(f"flops_per_token: expected a context of at least 1 token, got {context}")
        looked_up = {id(p) for m in self.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        if head is not None:
            looked_up.discard(id(head.weight))
        maps = [p for p in self.parameters() if p.dim() >= 2 and id(p) not in looked_up]
        weights, learned = sum(p.numel() for p in maps), sum(p.numel() for p in maps if p.requires_grad)
        sizes: Any = self.model.config.get_text_config()  # type: ignore[union-attr, operator]
        heads, width = sizes.num_attention_heads, sizes.hidden_size
        head_dim = getattr(sizes, "head_dim", None) or width // heads
        seen = self.config.spec.weights.equivalent_keys(self.config.spec.pattern.mean_keys(context, causal=True))
        attention = 4.0 * sizes.num_hidden_layers * heads * head_dim * seen
        again = 2.0 * weights + attention if self.config.gradient_checkpointing else 0.0
        return 4.0 * weights + 2.0 * learned + 3.0 * attention + again

    @torch.no_grad()
    def continue_text(
        self,
        prompt_bt: Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop_token: int | None = None,
    ) -> Tensor:
        """Continue each prompt by the model's own `generate`; temperature 0 takes the likeliest token."""
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
        was_training = self.training
        self.eval()
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                made: Tensor = self.model.generate(  # type: ignore[operator]
                    input_ids=prompt_bt,
                    attention_mask=torch.ones_like(prompt_bt),
                    max_new_tokens=max_new_tokens,
                    eos_token_id=stop_token,
                    pad_token_id=stop_token,
                    **sampling,
                )
        finally:
            self.train(was_training)
        return made

    def export(self, folder: Path, *, merge: bool = True) -> None:
        """Write the model as a Hugging Face folder, which `clearhead.hf.load` reads; see `clearhead.hf.export`."""
        from clearhead.hf.export import export

        export(self, folder, merge=merge)

    @property
    def adapter(self) -> Any | None:
        """peft's model around this one's modules; None without LoRA."""
        return self._adapter[0]

    @torch.no_grad()
    def _check_segments(self) -> None:
        """Raise `UserError` when two documents in one row would see each other, or count on from each other."""
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            raise UserError(
                f"{self.config.source}: this model takes no position_ids, so documents packed into one window cannot "
                f"be kept apart; it cannot be fine-tuned here"
            )
        was_training = self.training
        self.eval()
        try:
            ids = torch.arange(1, 8, device=next(self.parameters()).device)[None] % self.config.vocab_size
            numbers = torch.tensor([[0, 0, 0, 1, 1, 1, 1]], device=ids.device)
            packed, alone = self(ids, segments=numbers)[:, 3:].float(), self(ids[:, 3:]).float()
        finally:
            self.train(was_training)
        error = ((packed - alone).norm() / alone.norm().clamp_min(1e-30)).item()
        if not error < (DROPS_SEGMENTS if self.config.weights == "fp32" else 0.1):
            raise UserError(
                f"{self.config.source}: documents packed into one window disturb each other under attention="
                f"{self.config.attention} (their logits change by {error:.2g}); it cannot be fine-tuned here"
            )


def positions_in_segments(segments: Tensor) -> Tensor:
    """Return each token's position in its own document, [b, t] -> [b, t]; documents are runs of one number."""
    t = segments.shape[1]
    place = torch.arange(t, device=segments.device).expand_as(segments)
    opens = torch.ones_like(segments, dtype=torch.bool)
    opens[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = torch.where(opens, place, torch.zeros_like(place)).cummax(dim=1).values
    return place - first


def read_model(folder: Path, dtype: torch.dtype) -> Any:
    """Read a causal language model of transformers from a folder. Raises `UserError` in one line when it cannot be."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"{folder}: a Hugging Face model needs the transformers package: pip install 'clearhead[hf]'"
        ) from None
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
        model, found = loaded
    except Exception as error:  # transformers raises of every kind for a broken folder
        raise UserError(f"{folder}: transformers cannot load it ({' '.join(str(error).split())[:300]})") from error
    finally:
        logging.set_verbosity(before)
    for problem, words in (("missing_keys", "lack"), ("unexpected_keys", "hold more than the model:")):
        names = sorted(found[problem])
        if names:
            raise UserError(
                f"{folder}: the weights {words} {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}; "
                f"fine-tuning begins from a whole, plain model"
            )
    return model


def _patch(model: Any, config: PretrainedConfig) -> None:
    """Give every arm the same path: plain softmax is patched as well."""
    import clearhead.hf as hf

    options = None
    if isinstance(config.spec.temperature, Selective):
        options = hf.TemperatureOptions(
            granularity=config.temperature_granularity,
            parts=config.temperature_parts,
            slope=config.temperature_slope,
            on=config.temperature_targets,
        )
    hf.patch(model, config.attention, temperature=options)


def _check_vocabulary(config: PretrainedConfig, model: Any) -> None:
    own = int(model.config.get_text_config().vocab_size)
    if config.vocab_size != own:
        raise UserError(f"model.vocab_size={config.vocab_size}: {config.source} has {own} ids; set it to that")


def _keep_what_learns(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Drop from the state dict what training leaves as it is."""
    learns = {f"{prefix}{name}" for name in _learning_names(module)}
    for name in [name for name in state if name.startswith(prefix) and name not in learns]:
        del state[name]


def _learning_names(module: nn.Module) -> Iterator[str]:
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            yield name
