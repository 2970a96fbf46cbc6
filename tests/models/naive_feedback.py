"""The Feedback Transformer written out token by token, head by head, key by key: what the fast model must equal.

It reads the weights by name, keeps memory vectors only, and projects every one of them anew for every layer and token.
Legend: w width, d head dim, n memories seen.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def naive_logits(model, tokens_t, segments_t=None, *, block=None):
    """Logits [t, V] of one row. `block`: where memories are detached; None = the config's, 0 = nowhere."""
    config = model.config
    block = config.feedback_block if block is None else block
    weights = dict(model.named_parameters(remove_duplicate=False))
    shares = torch.exp(weights["mix.weight"]) / torch.exp(weights["mix.weight"]).sum()
    zero = torch.zeros(config.width, dtype=torch.float64)
    memories, outputs = [], []
    for t, token in enumerate(tokens_t.tolist()):
        begins = t == 0 or (segments_t is not None and segments_t[t] != segments_t[t - 1])
        if begins:
            position = 0
            memories = [zero] * config.feedback_window if config.feedback_start == "zeros" else []
        if block and t % block == 0:
            memories = [m.detach() for m in memories]
        seen = memories[-config.feedback_window :]
        x = weights["embedding.weight"][token]
        if config.position == "learned":
            x = x + weights["position.table.weight"][position]
        states = [x]
        for layer in range(config.layers):
            x = _block(config, weights, layer, x, seen, position)
            states.append(x)
        memories.append(sum(share * state for share, state in zip(shares, states)))
        outputs.append(_norm(config, weights, "norm", x) if config.norm_placement == "pre" else x)
        position += 1
    return torch.stack(outputs) @ weights["head.weight"].T


def _norm(config, weights, name, x):
    gain = weights[f"{name}.weight"]
    if config.norm == "rms":
        return x / (x.pow(2).mean() + 1e-6).sqrt() * gain
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * gain + weights[f"{name}.bias"]


def _block(config, weights, layer, x, seen, position):
    here = f"blocks.{layer}."
    for part in ("attention", "feed_forward"):
        norm = f"{here}{part}_residual.norm"
        h = _norm(config, weights, norm, x) if config.norm_placement == "pre" else x
        out = (
            _attention(config, weights, layer, h, seen, position) if part == "attention" else _hidden(weights, here, h)
        )
        x = x + out
        x = _norm(config, weights, norm, x) if config.norm_placement == "post" else x
    return x


def _hidden(weights, here, h):
    return weights[here + "feed_forward.down.weight"] @ F.relu(weights[here + "feed_forward.up.weight"] @ h)


def _attention(config, weights, layer, h, seen, position):
    here = f"blocks.{layer}.attention."
    d, group = config.head_size, config.heads // config.key_value_heads
    selective = config.attention.endswith("selective")
    outs = []
    for head in range(config.heads):
        rows = slice(head * d, head * d + d)
        shared = slice(head // group * d, head // group * d + d)
        q = weights[here + "query.weight"][rows] @ h
        temperature = 1.0
        if selective:
            count = config.feedback_window if config.feedback_start == "zeros" else max(len(seen), 1)
            temperature = _temperature(weights, here + "temperatures.query", head, q, count)
        q = temperature * _turned(config, _headed(config, weights, here + "query_norm", q), position)
        scores, values = [], []
        for back, m in zip(range(len(seen), 0, -1), seen):
            m = _norm(config, weights, "memory_norm", m) if config.norm_placement == "pre" else m
            k = weights[here + "key.weight"][shared] @ m
            k = _turned(config, _headed(config, weights, here + "key_norm", k), position - back)
            v = weights[here + "value.weight"][shared] @ m
            if selective:
                own = max(position - back + 1, 1)
                v = v * _temperature(weights, here + "temperatures.value", head // group, v, own)
            if config.position == "relative_key":
                k = k + weights["relative_key.table"][config.feedback_window - back]
            score = q @ k / math.sqrt(d)
            if config.position == "alibi":
                score = score - 2.0 ** (-8.0 * (head + 1) / config.heads) * back
            if config.position == "t5":  # more buckets than the window: each distance has its own
                score = score + weights["relative.table"][head, back]
            scores.append(score)
            values.append(v)
        if not seen:
            outs.append(torch.zeros(d, dtype=torch.float64))
            continue
        x_n, v_nd = torch.stack(scores), torch.stack(values)
        a_n = torch.exp(x_n) / torch.exp(x_n).sum()
        if config.attention.startswith("self_adjust"):
            a_n = a_n * x_n
        mixed = torch.log(a_n @ torch.exp(v_nd)) if config.attention.startswith("laser") else a_n @ v_nd
        outs.append(mixed)
    return weights[here + "output.weight"] @ torch.cat(outs)


def _headed(config, weights, name, x):
    return x / (x.pow(2).mean() + 1e-6).sqrt() * weights[f"{name}.weight"] if config.qk_norm else x


def _turned(config, x, position):
    if config.position != "rope":
        return x
    half = len(x) // 2
    angle = position * 10000.0 ** -(torch.arange(half) / half)  # fp32, as the model's angles are
    cos, sin = angle.cos().double(), angle.sin().double()
    return torch.cat((x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin))


def _temperature(weights, name, head, projected, count):
    f = weights[f"{name}.token.vector"][head] @ F.gelu(projected)
    return 1 + torch.tanh(f) + torch.sigmoid(weights[f"{name}.position.slope"]) * math.log(count)
