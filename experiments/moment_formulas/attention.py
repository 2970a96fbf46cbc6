"""The cases of softmax and attention: in the range that the authors checked, and where it saturates.

The grids keep the published ranges of score strength, dropout and correlations; width and length are smaller than
theirs (100 to 1000), because our simulation draws fresh weights and several sequences for each point on one core.
Where a score deviation is a parameter (`spread`), W_q and W_k are given the variance that makes it so within a row.
"""

from __future__ import annotations

import math

from torch import Generator

from clearhead.signal.moments.attention import attention
from clearhead.signal.moments.attention_backward import attention_backward
from clearhead.signal.moments.attention_without_values import attention_without_values
from clearhead.signal.moments.published_attention import published_attention, published_attention_backward
from clearhead.signal.moments.softmax import (
    published_softmax,
    published_softmax_backward,
    softmax,
    softmax_backward,
)
from clearhead.signal.moments.types import GradientMoments, Moments
from clearhead.signal.skeleton import AttentionShape, Matrix
from experiments.moment_formulas.attention_simulation import Inputs, simulate_attention, simulate_softmax
from experiments.moment_formulas.case import Case, Params
from experiments.moment_formulas.draw import equicorrelated, gradient_by, second_moments_of

CORRELATIONS = (0.0, 0.2, 0.4, 0.6, 0.8)
THIRDS = (0.0, 1 / 3, 2 / 3)
OUTPUT = ("variance", "covariance", "gradient_variance", "gradient_covariance")
WEIGHTS = ("query_weight_gradient", "key_weight_gradient", "value_weight_gradient", "output_weight_gradient")
LOOSE = {name: (0.2, 0.45) for name in ("query_weight_gradient", "key_weight_gradient")}
"""Where the theory of the score path is known to be rough: rotary positions on tokens that share much, Self-Adjust."""
SATURATED = {"variance": (0.05, 0.1), "covariance": (0.05, 0.1), **dict.fromkeys((*OUTPUT[2:], *WEIGHTS), (0.1, 0.2))}
"""The targets past the published range: 10 % forward, 20 % backward."""

# --- softmax ----------------------------------------------------------------------------------------------------------

SOFTMAX_GRID = {
    "sigma": (0.01, 0.0316, 0.1, 0.316, 1.0),
    "L": (300, 720, 1700, 4200, 10000),
    "r": CORRELATIONS,
    "sigma_g": (0.01, 0.0316, 0.1, 0.316, 1.0),
}


def _softmax_simulated(params: Params, generator: Generator) -> dict[str, float]:
    return simulate_softmax(int(params["L"]), params["sigma"], params["r"], params["sigma_g"], generator)


def _softmax_case(name: str, note: str, form: str, grid: dict[str, tuple[float, ...]], points: int = 60) -> Case:
    def predict(params: Params) -> dict[str, float]:
        logits, g = Moments.of(params["sigma"] ** 2, params["r"]), GradientMoments(params["sigma_g"] ** 2, 0.0)
        count = int(params["L"])
        if form == "ours":
            a, back = softmax(logits, count), softmax_backward(g, logits, count)
        else:
            finer = form == "finer"
            a = published_softmax(logits, count, finer=finer)
            back = published_softmax_backward(g, logits, count, finer=finer)
        return {"mean": a.mean, "variance": a.variance, "gradient_variance": back.variance}

    published = {"variance": (0.2, 0.9, 4.0), "gradient_variance": (0.1, 0.6, 4.5)}
    if form == "approximate":
        published = {"variance": (0.1, 0.5, 2.6), "gradient_variance": (0.1, 0.6, 3.7)}
    return Case(
        name,
        grid,
        predict,
        _softmax_simulated,
        ("mean", "variance", "gradient_variance"),
        note,
        published if grid is SOFTMAX_GRID and form != "ours" else {},
        points=points,
    )


# --- attention --------------------------------------------------------------------------------------------------------


def shape_of(params: Params) -> AttentionShape:
    """The attention that the parameters describe; weights keep unit variance but for the scores' strength."""
    d, head_dim, heads = int(params["d"]), int(params["d_k"]), int(params.get("heads", 1))
    kv_heads = heads // int(params.get("group", 1))
    r = params["context_r"] if params.get("cross") else params["r"]
    if "spread" in params:  # scale^2 d_k var_q var_k d^2 (1 - r) = spread^2
        variance = params["spread"] / (d * math.sqrt(1.0 - r))
    else:
        variance = params["sigma_qk_d"] ** 2 / d
    value_variance = params.get("value_variance", 1.0 - r) / (1.0 - r) / d
    return AttentionShape(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        query=Matrix(d, heads * head_dim, variance),
        key=Matrix(d, kv_heads * head_dim, variance),
        value=Matrix(d, kv_heads * head_dim, value_variance),
        output=Matrix(heads * head_dim, d, 1.0 / (heads * head_dim)),
        causal=bool(params.get("causal", 0.0)),
        spec=SPECS[int(params.get("spec", 0.0))],
        scale=(params["spread"] / math.sqrt(head_dim * (1.0 - r))) if params.get("qk_norm") else None,
        dropout=params.get("p", 0.0),
        rope_base=10000.0 if params.get("rotary") else None,
        qk_norm=bool(params.get("qk_norm", 0.0)),
        cross=bool(params.get("cross", 0.0)),
    )


SPECS = (
    "softmax",
    "laser",
    "self_adjust:form=product",
    "self_adjust:form=min_shift",
    "self_adjust:form=minmax",
    "self_adjust:form=range",
    "self_adjust:form=range,detach_extrema=true",
)


def inputs_of(params: Params) -> Inputs:
    """What the simulation draws."""
    return Inputs(
        int(params["L"]),
        params["r"],
        params["r_g"],
        params.get("mu", 0.0),
        int(params.get("L_context", 0)),
        params.get("context_r", 0.0),
    )


def predict_attention(params: Params) -> dict[str, float]:
    """Ours."""
    shape, inputs = shape_of(params), inputs_of(params)
    forward = attention(
        Moments.of(1.0, inputs.r, inputs.mean),
        shape,
        width=shape.query.fan_in,
        tokens=inputs.tokens,
        context=Moments.of(1.0, inputs.context_r) if shape.cross else None,
        context_tokens=inputs.context_tokens if shape.cross else None,
    )
    back = attention_backward(GradientMoments.of(1.0, inputs.r_g), forward)
    found = {
        "variance": forward.output.variance,
        "covariance": forward.output.covariance,
        "mix_mean": forward.mix.mean,
        "mix_variance": forward.mix.variance,
        "gradient_variance": back.input.variance,
        "gradient_covariance": back.input.covariance,
        **{f"{name}_weight_gradient": value for name, value in back.matrices.items()},
    }
    if back.context is not None:
        found["context_gradient_variance"] = back.context.variance
        found["context_gradient_covariance"] = back.context.covariance
    return found


def predict_published(params: Params) -> dict[str, float]:
    """The authors' formulas, for the same attention; its output matrix keeps variances."""
    shape, inputs = shape_of(params), inputs_of(params)
    y = published_attention(
        Moments.of(1.0, inputs.r), shape.query, shape.key, shape.value, tokens=inputs.tokens, dropout=shape.dropout
    )
    at_mix = GradientMoments.of(1.0, inputs.r_g).scaled(shape.output.fan_out * shape.output.variance)
    g = published_attention_backward(at_mix, shape.value, tokens=inputs.tokens, dropout=shape.dropout)
    return {
        "variance": y.variance,
        "covariance": y.covariance,
        "gradient_variance": g.variance,
        "gradient_covariance": g.covariance,
    }


def _simulated(params: Params, generator: Generator) -> dict[str, float]:
    return simulate_attention(shape_of(params), inputs_of(params), generator)


PUBLISHED_RANGE = {
    "sigma_qk_d": (0.1, 0.245, 0.6),
    "d": (100, 200),
    "d_k": (32, 64, 100),
    "L": (64, 128, 256),
    "p": THIRDS,
    "r": CORRELATIONS,
    "r_g": CORRELATIONS,
}
PUBLISHED_ERRORS = {
    "variance": (1.4, 4.1, 7.8),
    "gradient_variance": (2.2, 13.3, 44.5),
    "covariance": (1.3, 3.9, 7.4),
    "gradient_covariance": (1.6, 4.5, 8.2),
}
SATURATED_GRID = {
    "spread": (0.5, 1.0, 2.0, 3.0, 4.0),
    "d": (64, 128),
    "d_k": (16, 32),
    "heads": (1, 2, 4, 8),
    "L": (32, 64, 128, 256, 512),
    "causal": (0.0, 1.0),
    "p": (0.0, 0.1),
    "r": CORRELATIONS,
    "r_g": CORRELATIONS,
}
SMALL = {"d": (64,), "d_k": (16,), "heads": (4,), "L": (32, 64, 128), "r": CORRELATIONS, "r_g": CORRELATIONS}


def _predict_bare(params: Params) -> dict[str, float]:
    shape = shape_of(params)
    forward = attention_without_values(
        Moments.of(1.0, params["r"]), shape.query, shape.key, tokens=int(params["L"]), causal=shape.causal
    )
    g = attention_backward(GradientMoments.of(1.0, params["r_g"]), forward).input
    return {
        "variance": forward.output.variance,
        "covariance": forward.output.covariance,
        "gradient_variance": g.variance,
        "gradient_covariance": g.covariance,
    }


def _simulate_bare(params: Params, generator: Generator) -> dict[str, float]:
    import torch

    shape, tokens = shape_of(params), int(params["L"])
    runs = []
    for _ in range(12):
        x = equicorrelated((6, tokens, shape.query.fan_in), 0.0, 1.0, params["r"], generator).requires_grad_()
        q, k = (
            x @ torch.randn(m.fan_in, m.fan_out, generator=generator).mul_(math.sqrt(m.variance))
            for m in (shape.query, shape.key)
        )
        scores = q @ k.mT * shape.head_dim**-0.5
        if shape.causal:
            scores = scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -math.inf)
        out = scores.softmax(-1) @ x
        g = equicorrelated((6, tokens, shape.query.fan_in), 0.0, 1.0, params["r_g"], generator)
        back = second_moments_of(gradient_by(x, out, g), "gradient_")
        runs.append({**second_moments_of(out.detach()), **back})
    return {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}


CASES: tuple[Case, ...] = (
    _softmax_case("softmax", "Ours: integrals; one row's weights.", "ours", SOFTMAX_GRID),
    _softmax_case(
        "softmax_saturated",
        "Ours, past the published range: logit deviation up to 8.",
        "ours",
        {"sigma": (1.0, 2.0, 4.0, 8.0), "L": (30, 100, 1000), "r": (0.0, 0.4, 0.8), "sigma_g": (1.0,)},
    ),
    _softmax_case("softmax_published_finer", "The authors' finer form.", "finer", SOFTMAX_GRID),
    _softmax_case("softmax_published_approximate", "The authors' short form.", "approximate", SOFTMAX_GRID),
    Case(
        "attention",
        PUBLISHED_RANGE,
        predict_attention,
        _simulated,
        OUTPUT,
        "Ours, one head, in the authors' range of score strengths; gradient by all paths.",
        points=200,
    ),
    Case(
        "attention_published",
        PUBLISHED_RANGE,
        predict_published,
        _simulated,
        OUTPUT,
        "The authors' single-head formulas on the same points: their gradient has no query/key path.",
        PUBLISHED_ERRORS,
        targets={name: (1.0, 1.0) for name in OUTPUT},
        points=50,
    ),
    Case(
        "attention_saturated",
        SATURATED_GRID,
        predict_attention,
        _simulated,
        OUTPUT + WEIGHTS,
        "Ours: score deviation within a row up to 4, with and without causal mask, 1 to 8 heads.",
        targets=SATURATED,
        points=200,
    ),
    Case(
        "attention_without_values",
        {"spread": (0.5, 1.0, 2.0, 4.0), "causal": (0.0, 1.0), **SMALL, "heads": (1,), "d_k": (16, 64)},
        _predict_bare,
        _simulate_bare,
        OUTPUT,
        "The attention matrix applied to its input.",
        targets={name: SATURATED[name] for name in OUTPUT},
        points=50,
    ),
    Case(
        "laser",
        {
            "spec": (1.0,),
            "spread": (0.5, 1.0, 2.0, 4.0),
            "value_variance": (0.25, 1.0, 4.0),
            "causal": (0.0, 1.0),
            **SMALL,
            "L": (32, 64),
        },
        predict_attention,
        _simulated,
        ("mix_mean", *OUTPUT, *WEIGHTS),
        "log(A exp V); value_variance is the part of it that tokens do not share.",
        targets={**SATURATED, "mix_mean": (0.05, 0.1)},
        points=40,
    ),
    Case(
        "self_adjust",
        {"spec": (2.0, 3.0, 4.0, 5.0), "spread": (0.5, 1.0, 2.0, 4.0), "causal": (0.0, 1.0), **SMALL},
        predict_attention,
        _simulated,
        OUTPUT + WEIGHTS,
        "The forms product (2), min_shift (3), minmax (4) and range (5). Means over sampled rows, so the prediction is "
        "noisy too.",
        targets={**{name: (0.1, 0.3) for name in OUTPUT + WEIGHTS}, **LOOSE},
        points=60,
    ),
    Case(
        "self_adjust_detached",
        {"spec": (6.0,), "spread": (0.5, 1.0, 2.0, 4.0), **SMALL},
        predict_attention,
        _simulated,
        OUTPUT + WEIGHTS,
        "The form range with its extrema held fixed. Bidirectional: under a causal mask the first row sees one key, "
        "and its gradient has no variance.",
        targets={name: (0.1, 0.3) for name in OUTPUT + WEIGHTS},
        points=16,
    ),
    Case(
        "attention_variants",
        {
            "spread": (0.5, 1.0, 2.0),
            "causal": (0.0, 1.0),
            "rotary": (0.0, 1.0),
            "qk_norm": (0.0, 1.0),
            "group": (1, 4),
            **SMALL,
        },
        predict_attention,
        _simulated,
        OUTPUT + WEIGHTS,
        "`spread` is that of the part which keys do not share; rotary positions add to it. Least right where tokens "
        "share much and positions are rotary: then scores are far from independent over keys.",
        targets={**{name: (0.1, 0.35) for name in OUTPUT + WEIGHTS}, **LOOSE},
        points=60,
    ),
    Case(
        "cross_attention",
        {"cross": (1.0,), "spread": (0.5, 1.0, 2.0, 4.0), "context_r": CORRELATIONS, "L_context": (16, 128), **SMALL},
        predict_attention,
        _simulated,
        (*OUTPUT, "context_gradient_variance", "context_gradient_covariance", *WEIGHTS),
        "Queries from the stream, keys and values from the context.",
        targets={**SATURATED, "context_gradient_variance": (0.1, 0.2), "context_gradient_covariance": (0.1, 0.2)},
        points=40,
    ),
)
