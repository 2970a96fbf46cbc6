"""`clearhead.init_`: one call that draws a model's parameters and puts the matching residual rules on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch.nn as nn

from clearhead.errors import UserError, unknown
from clearhead.init import admin
from clearhead.init.embedding_correlation import batch_repetition, config_correlation, token_repetition
from clearhead.init.equip import equip
from clearhead.init.plan import Piece
from clearhead.init.report import InitReport, check_once, measure, residual_constants_of
from clearhead.init.rules import DeepScaleRules
from clearhead.init.standard import constant
from clearhead.init.start import start_pieces, start_rules
from clearhead.models.choices import DEEPSCALE, INITS
from clearhead.models.config import ModelConfig

# What `init_` takes by its name there, and the field of `ModelConfig` that says the same.
FIELDS = {
    "k": "deepscale_k",
    "alpha": "deepscale_alpha",
    "depth_counts": "depth_counts",
    "constants": "deepscale_constants",
    "keys": "deepscale_keys",
    "embedding_correlation": "embedding_correlation",
    "omega": "admin_omega",
    "output_change": "output_change",
    "omega_form": "omega_form",
}
OPTIONS: dict[str, tuple[str, ...]] = {
    "standard": (),
    "xavier": (),
    "small": (),
    "deepscale": ("k", "alpha", "depth_counts", "constants", "keys", "embedding_correlation"),
    "deepscale_simple": ("k", "alpha", "depth_counts", "embedding_correlation"),
    "admin": ("omega", "embedding_correlation", "include_padding"),
    "admin_constant": ("output_change", "omega_form"),
}


def init_(
    model: nn.Module, scheme: str, *, batch: admin.Batch | None = None, seed: int = 0, **options: Any
) -> InitReport:
    """Draw every parameter of `model` anew and give it the scheme's residual rules, in place.

    Args:
        model: one of ours, or any that `clearhead.anatomy.find.anatomy_of` understands (Hugging Face), from scratch.
        scheme: standard | xavier | small | deepscale | deepscale_simple | admin | admin_constant.
        batch: token ids [b, t], or the model's arguments as a mapping or a tuple. admin profiles on it; deepscale reads
            how often tokens repeat from it (unless `embedding_correlation` is given).
        seed: every parameter has its own generator, seeded by (seed, name).
        options: of deepscale: k=2, alpha=1, depth_counts="layers"|"blocks", constants="exact"|"published",
            keys="context"|"many", embedding_correlation (a number; else from `batch`, else Zipf's law). Of admin:
            omega="profiled"|"predicted", include_padding=False. Of admin_constant:
            output_change="log"|"constant"|"linear", omega_form="buffer"|"vector". See docs/initialisation.md.

    One of our models keeps the choice in its config, so it saves and loads like any other. On other models the rules
    are modules with hooks: see `clearhead.init.foreign`, and `clearhead.init.fold.fold_rules` before `save_pretrained`.

    Raises `UserError` for an unknown scheme or option, admin without a batch or on a pre-norm model, and models whose
    sums cannot take the rule.
    """
    from clearhead.anatomy.find import unwrap
    from clearhead.init.apply_foreign import init_foreign

    if scheme not in INITS:
        raise unknown("init", scheme, INITS)
    for name in options:
        if name not in OPTIONS[scheme]:
            raise unknown(f"option of init {scheme}", name, OPTIONS[scheme] or ("none",))
    if scheme == "admin" and options.get("omega", "profiled") == "profiled" and batch is None:
        raise UserError(
            "init_(model, 'admin') measures every branch and needs data: give batch= (token ids, or the model's "
            "arguments), or take the closed form with omega='predicted'"
        )
    model = unwrap(model)
    if not isinstance(getattr(model, "config", None), ModelConfig):
        return init_foreign(model, scheme, batch, seed, options)
    return _init_ours(model, scheme, batch, seed, options)


def _init_ours(
    model: nn.Module, scheme: str, batch: admin.Batch | None, seed: int, options: Mapping[str, Any]
) -> InitReport:
    changes = {FIELDS[name]: value for name, value in options.items() if name in FIELDS}
    before: Any = model.config
    config: ModelConfig = dataclasses.replace(before, init=scheme, **changes)
    if scheme in DEEPSCALE and options.get("embedding_correlation") is None and batch is not None:
        types = batch.get("segment_types") if isinstance(batch, Mapping) else None  # left out, they are all 0
        same_segment = 1.0 if types is None else batch_repetition(types.cpu().numpy())
        measured = config_correlation(config, token_repetition(model, batch), same_segment)
        config = dataclasses.replace(config, embedding_correlation=measured)
    equip(model, config)
    pieces = start_pieces(model, config)
    check_once(dict(model.named_parameters()), pieces)
    model.init_parameters(seed)  # type: ignore[operator]

    facts, notes = {"seed": seed, **scheme_facts(config)}, _notes(model, config)
    if scheme == "admin":
        if config.admin_omega == "profiled":
            assert batch is not None
            padded = bool(options.get("include_padding", False))
            admin.profile_omega(model, batch, include_padding=padded, seed=seed)
        pieces = [_with_omega(model, piece) for piece in pieces]
    return InitReport(scheme, measure(model, pieces), residual_constants_of(model), facts, tuple(notes))


def scheme_facts(config: ModelConfig) -> dict[str, Any]:
    """The numbers that a config's initialisation starts from."""
    if config.init not in DEEPSCALE:
        return {}
    given = config.embedding_correlation is not None
    return {
        "k": config.deepscale_k,
        "alpha": config.deepscale_alpha,
        "depth counts": config.depth_counts,
        "embedding correlation": config.embedding_correlation if given else config_correlation(config),
        "embedding correlation from": "the config" if given else f"Zipf's law over {config.vocab_size:,} tokens",
        "embedding tables": config.embedding_tables,
    }


def _notes(model: nn.Module, config: ModelConfig) -> list[str]:
    if config.init not in DEEPSCALE:
        return []
    rules = start_rules(model, config)
    notes = list(rules.notes) if isinstance(rules, DeepScaleRules) else []
    if (config.spec.weights.name, config.spec.read.name) != ("softmax", "mean"):
        notes.append(f"the constants are derived for softmax attention and means of values, not for {config.attention}")
    return notes


def _with_omega(model: nn.Module, piece: Piece) -> Piece:
    if not piece.parameter.endswith(".rule.omega"):
        return piece
    value = float(model.get_parameter(piece.parameter).detach()[0])
    return dataclasses.replace(piece, draw=constant(value), rule="admin: sqrt(1 + variances of earlier branches)")
