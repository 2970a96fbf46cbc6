"""`init_` on models that are not ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn as nn

from clearhead.anatomy.parts import Anatomy
from clearhead.errors import UserError
from clearhead.init import admin, foreign, foreign_admin
from clearhead.init.admin_omega import constant_omega
from clearhead.init.deepscale import logit_multiplier
from clearhead.init.embedding_correlation import batch_repetition, batch_tokens, token_repetition
from clearhead.init.plan import Piece, Rules, draw_plan, make_plan
from clearhead.init.report import InitReport, check_once, measure, residual_constants_of
from clearhead.init.rules import AdminRules, DeepScaleOptions, DeepScaleRules, PlainRules, SimplifiedRules
from clearhead.init.standard import SCHEMES, constant
from clearhead.models.choices import ADMIN


def init_foreign(
    model: nn.Module, scheme: str, batch: admin.Batch | None, seed: int, options: Mapping[str, Any]
) -> InitReport:
    """See `clearhead.init_`; every rule that an earlier call put on the model is taken off first."""
    from clearhead.anatomy.find import anatomy_of

    foreign.remove_rules(model)
    anatomy = anatomy_of(model)
    notes = list(anatomy.notes)
    facts: dict[str, Any] = {"seed": seed}
    if scheme in ADMIN:
        foreign.post_norm_only(anatomy)
    rules = _rules(anatomy, scheme, batch, options)
    pieces = make_plan(anatomy, rules)
    check_once(dict(model.named_parameters()), pieces)
    if isinstance(rules, DeepScaleRules):  # refuses before anything is drawn
        foreign.attach_deepscale(anatomy, rules.constants)
    draw_plan(model, pieces, seed)

    if isinstance(rules, DeepScaleRules):
        facts |= {"embedding correlation": rules.r0, "embedding tables": rules.tables}
        notes += [*rules.notes, "norms keep their eps; the rewritten sums ask for eps / lambda^(2n)"]
        if anatomy.head_tied and anatomy.head is not None:
            std = rules.embedding(anatomy.stacks[-1], anatomy.stacks[-1].embeddings[0])[0].scale
            facts["head scale"] = logit_multiplier(anatomy.width, std**2) / anatomy.head_scale
            foreign.attach_head(anatomy, facts["head scale"])
    elif scheme in ADMIN:
        omegas, form = _omegas(anatomy, scheme, batch, seed, options)
        facts |= {"omega": {name: [round(x, 6) for x in values] for name, values in omegas.items()}, "omega form": form}
        pieces = _with_omegas(model, pieces)
    return InitReport(scheme, measure(model, pieces), residual_constants_of(model), facts, tuple(notes))


def _rules(anatomy: Anatomy, scheme: str, batch: admin.Batch | None, options: Mapping[str, Any]) -> Rules:
    layers = max(len(stack.blocks) for stack in anatomy.stacks)
    if scheme in SCHEMES:
        return PlainRules(scheme, anatomy.width, layers)
    if scheme in ADMIN:
        return AdminRules(anatomy.width, layers)
    names = ("k", "alpha", "depth_counts", "constants")
    given = DeepScaleOptions(
        tokens=None if options.get("keys", "context") == "many" else _tokens(anatomy, batch),
        **{name: options[name] for name in names if name in options},
    )
    make = SimplifiedRules if scheme == "deepscale_simple" else DeepScaleRules
    tables = {stack.name: max(1, len(stack.embeddings)) for stack in anatomy.stacks}
    return make(anatomy, given, _correlations(anatomy, batch, options), tables)


def _tokens(anatomy: Anatomy, batch: admin.Batch | None) -> int | None:
    """Length of the batch's sequences; None without one."""
    return None if batch is None else int(batch_tokens(anatomy.model, batch).shape[1])


def _correlations(anatomy: Anatomy, batch: admin.Batch | None, options: Mapping[str, Any]) -> dict[str, float]:
    """r0 of each stack: given, from the batch, or by Zipf's law; the tables weigh alike."""
    from clearhead.signal.moments.embedding import segment_repetition, zipf_repetition

    given = options.get("embedding_correlation")
    answer = {}
    for stack in anatomy.stacks:
        if given is not None:
            answer[stack.name] = float(given)
            continue
        token = next((table for table in stack.embeddings if table.role == "token"), None)
        if batch is not None:
            repeated = token_repetition(anatomy.model, batch, stack.name)
        elif token is not None:
            repeated = zipf_repetition(getattr(token.module, token.leaf).shape[0])
        else:
            raise UserError("deepscale: this model reads no tokens; give embedding_correlation=")
        of_role = {"token": repeated, "position": 0.0, "segment": segment_repetition()}
        if batch is not None:
            types = batch.get("token_type_ids") if isinstance(batch, Mapping) else None  # left out, they are all 0
            of_role["segment"] = 1.0 if types is None else batch_repetition(types.cpu().numpy())
        answer[stack.name] = sum(of_role[table.role] for table in stack.embeddings) / max(1, len(stack.embeddings))
    return answer


def _omegas(
    anatomy: Anatomy, scheme: str, batch: admin.Batch | None, seed: int, options: Mapping[str, Any]
) -> tuple[Mapping[str, list[float]], str]:
    """Attach the omegas; returns them and whether they are vectors or constants."""
    if scheme == "admin_constant":
        change, form = str(options.get("output_change", "log")), str(options.get("omega_form", "buffer"))
        if form == "vector" and not foreign.needs_omega_vector(anatomy):
            raise UserError("omega_form=vector: this model's sums stand in code that cannot take a vector; use buffer")
        counts = {stack.name: len(foreign_admin.sublayers(stack)) for stack in anatomy.stacks}
        constants = {name: [constant_omega(count, change)] * count for name, count in counts.items()}
        return constants, foreign_admin.attach_omegas(anatomy, constants, form)
    if options.get("omega", "profiled") == "predicted":
        predicted = admin.predicted_omega(anatomy, _correlations(anatomy, batch, options), _tokens(anatomy, batch))
        return predicted, foreign_admin.attach_omegas(anatomy, predicted)
    assert batch is not None
    padded = bool(options.get("include_padding", False))
    profiled = foreign_admin.profile(anatomy, batch, include_padding=padded, seed=seed)
    return profiled, "vector" if foreign.needs_omega_vector(anatomy) else "constant"


def _with_omegas(model: nn.Module, pieces: list[Piece]) -> list[Piece]:
    """The plan with the omegas that are parameters now."""
    known = {piece.parameter for piece in pieces}
    found = [(name, p) for name, p in model.named_parameters() if name not in known]
    return pieces + [Piece(name, "", constant(float(p.detach()[0])), "admin: omega") for name, p in found]
