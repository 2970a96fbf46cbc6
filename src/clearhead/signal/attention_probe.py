"""Attention statistics on a sample of query rows, wherever the scores can be seen.

Three doors, all closed again by leaving the `with` block of `AttentionProbe.looking`:

- our own `attend` shows its call (`clearhead.attention.observe`): the weights are then the mechanism's own;
- PyTorch's `scaled_dot_product_attention` and `multi_head_attention_forward`: query, key, mask and scale pass through a
  torch function mode;
- a softmax over [b, h, n, m] (or [b*h, n, m]) inside an attention module: attention written out ("eager").

Which layer it is: the attention module that is running, known from its forward hooks.

The sample: the same `rows` query positions for every layer and head, drawn once; head h looks at one sequence, the
h-th of the batch from the longest on. Padded queries and queries that see no key are left out.

Legend: b batch, h query heads, g key/value heads, n query rows, r sampled rows, m keys, d head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clearhead.attention.call import Call
from clearhead.attention.features import kernel_scores
from clearhead.attention.observe import watching
from clearhead.attention.precision import without_autocast, working_dtype
from clearhead.attention.reference import DENSE_WEIGHTS
from clearhead.attention.spec import Performer, Softmax
from clearhead.attention.terms import Rows
from clearhead.signal.taps import effective_ranks
from clearhead.signal.trace import AttentionStats

NAMES = ("score_variance", "entropy", "uniform_entropy", "largest_weight", "participation", "jacobian_gain")


class Sample:
    """Which rows and sequences a call's statistics are taken on; remembered, so that all layers have the same."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self._drawn: dict[tuple[int, int, int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def draw(self, b: int, h: int, n: int, valid_bn: Tensor | None, device: torch.device) -> tuple[Tensor, ...]:
        """(sequence of each head [h], sampled rows [r], whether a row counts [h, r])."""
        key = (b, h, n, 0 if valid_bn is None else id(valid_bn))
        if key not in self._drawn:
            generator = torch.Generator().manual_seed(self.seed)
            valid = torch.ones(b, n, dtype=torch.bool) if valid_bn is None else valid_bn.cpu()
            order = valid.sum(dim=1).argsort(descending=True, stable=True)
            sequence_h = order[torch.arange(h) % b]
            places = valid[sequence_h].any(dim=0).nonzero().flatten()
            row_r = places[torch.randperm(len(places), generator=generator)[: self.rows]].sort().values
            counts_hr = valid[sequence_h][:, row_r]
            self._drawn[key] = tuple(x.to(device) for x in (sequence_h, row_r, counts_hr))  # type: ignore[assignment]
        return self._drawn[key]


@without_autocast
@torch.no_grad()
def statistics(
    scores_hrm: Tensor, visible_hrm: Tensor, counts_hr: Tensor, weights_hrm: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(the sums of `NAMES` and the number of rows, [7] float64; Gram matrices of the rows, [h, r, r]).

    `weights_hrm` are the mechanism's, where they are not the softmax. Then entropy is that of |weights| normalised to
    sum 1, and the Jacobian gain remains the softmax's.
    """
    dtype = working_dtype(scores_hrm.dtype)
    scores = scores_hrm.to(dtype).masked_fill(~visible_hrm, 0.0)
    number_hr = visible_hrm.sum(dim=-1).to(dtype)
    counts = counts_hr & (number_hr > 0)
    safe_hr = number_hr.clamp_min(1.0)
    mean_hr1 = (scores.sum(dim=-1) / safe_hr).unsqueeze(-1)
    variance_hr = (scores - mean_hr1).masked_fill(~visible_hrm, 0.0).square().sum(dim=-1) / safe_hr

    softmax = scores.masked_fill(~visible_hrm, float("-inf")).masked_fill(~counts.unsqueeze(-1), 0.0).softmax(dim=-1)
    squares_hr = softmax.square().sum(dim=-1)
    gain_hr = squares_hr - 2.0 * softmax.pow(3).sum(dim=-1) + squares_hr.square()
    weights = softmax if weights_hrm is None else weights_hrm.to(dtype)
    shares = softmax
    if weights_hrm is not None:
        squares_hr = weights.square().sum(dim=-1)
        sizes = weights.abs()
        shares = sizes / sizes.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    entropy_hr = -torch.special.xlogy(shares, shares).sum(dim=-1)
    largest_hr = weights.masked_fill(~visible_hrm, float("-inf")).amax(dim=-1)  # weights may be negative
    rows = torch.stack([variance_hr, entropy_hr, safe_hr.log(), largest_hr, squares_hr, gain_hr])
    sums = rows.masked_fill(~counts, 0.0).flatten(1).sum(dim=1)
    kept = weights.masked_fill(~counts.unsqueeze(-1), 0.0).double()
    return torch.cat([sums, counts.sum().to(dtype).reshape(1)]), kept @ kept.mT


class AttentionProbe:
    """Collects the statistics of every attention module that runs while it looks."""

    def __init__(self, rows: int, seed: int) -> None:
        self.sample = Sample(rows, seed)
        self.running: list[tuple[str, Tensor | None]] = []
        """Attention modules that are running, the innermost last: path, and the validity [b, n] of their queries."""
        self.found: dict[str, tuple[Tensor, Tensor]] = {}
        self.door: dict[str, str] = {}
        self._busy = False

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Open the three doors inside a `with` block."""
        with ExitStack() as doors:
            doors.enter_context(watching(self._attend))
            doors.enter_context(_Mode(self))
            yield

    def stats(self) -> dict[str, AttentionStats]:
        """What was found, by the path of the attention module."""
        if not self.found:
            return {}
        sums = torch.stack([one.double().cpu() for one, _ in self.found.values()]).tolist()
        answer = {}
        for (path, (_, grams)), row in zip(self.found.items(), sums, strict=True):
            *totals, count = row
            if count == 0:
                continue
            ranks = effective_ranks(grams.cpu())
            ranks = ranks[ranks != 0]  # heads whose sequence gave no row
            values = {name: total / count for name, total in zip(NAMES, totals, strict=True)}
            answer[path] = AttentionStats(**values, effective_rank=float(ranks.mean()) if len(ranks) else None)
        return answer

    def _wanted(self) -> bool:
        """Whether a module is running whose statistics are still missing, and this is not our own arithmetic."""
        return not self._busy and bool(self.running) and self.running[-1][0] not in self.found

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        self._busy = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._busy = False

    def _keep(
        self, door: str, scores: Tensor, visible: Tensor, counts_hr: Tensor, weights: Tensor | None = None
    ) -> None:
        path = self.running[-1][0]
        self.found[path] = statistics(scores, visible, counts_hr, weights)
        self.door[path] = door

    # ---- our attend ----

    def _attend(self, call: Call) -> None:
        if self._wanted():
            with self._arithmetic():
                self._look_at_call(call)

    def _look_at_call(self, call: Call) -> None:
        b, h, _, n, m = call.sizes
        sequence_h, row_r, counts_hr = self._drawn(b, h, n, call.q.device)
        # Drawn rows have gaps: `listed` keeps a bias from taking them for a run.
        rows = Rows(row_r, torch.arange(m, device=call.q.device), call.mask.resolved_offset(), listed=True)
        scores = _scores(call.q, call.k, sequence_h, row_r, call.scale)
        if isinstance(call.spec.weights, Performer) and not call.spec.weights.rows_sum_to_one:
            return  # weights with signs have no entropy
        if call.bias is not None:
            scores = scores + _of_heads(call.bias.block(rows), sequence_h).to(scores.dtype)
        seen = call.mask.visible(rows)
        visible = torch.ones_like(scores, dtype=torch.bool)
        if seen is not None:
            visible = visible & _of_heads(seen, sequence_h)
        weights = None
        if isinstance(call.spec.weights, Performer):  # softmax of the logs of the kernel that it makes
            scores = _kernel_scores(call, sequence_h, row_r)
        elif not isinstance(call.spec.weights, Softmax):
            formula = DENSE_WEIGHTS[type(call.spec.weights)]
            weights = formula(call.spec.weights, scores.unsqueeze(0), visible.unsqueeze(0)).squeeze(0)
        self._keep("attend", scores, visible, counts_hr, weights)

    # ---- PyTorch's own ----

    def see(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at a call of a torch function, if it is one of attention's."""
        if not self._wanted():
            return
        with self._arithmetic():
            if function is F.scaled_dot_product_attention:
                self._look_at_sdpa(*args, **kwargs)
            elif function is F.multi_head_attention_forward:
                self._look_at_heads(inspect.signature(function).bind(*args, **kwargs).arguments)
            elif function in _SOFTMAXES:
                dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
                scores = args[0] if args else kwargs.get("input")
                if isinstance(scores, Tensor) and dim in (-1, scores.dim() - 1):
                    self._look_at_softmax(scores)

    def _look_at_sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if query.dim() != 4:
            return
        b, h, n, d = query.shape
        m = key.shape[-2]
        sequence_h, row_r, counts_hr = self._drawn(b, h, n, query.device)
        scores = _scores(query, key, sequence_h, row_r, d**-0.5 if scale is None else scale)
        visible = torch.ones_like(scores, dtype=torch.bool)
        if is_causal:  # PyTorch's own is aligned at the top left
            visible = visible & (torch.arange(m, device=query.device) <= row_r[:, None])
        if attn_mask is not None:
            told = attn_mask[(None,) * (4 - attn_mask.dim())]
            told = _of_heads(told if told.shape[2] == 1 else told[:, :, row_r], sequence_h)
            scores, visible = _told(scores, visible, told)
        self._keep("sdpa", scores, visible, counts_hr)

    def _look_at_heads(self, call: dict[str, Any]) -> None:
        """`torch.nn.MultiheadAttention`: inputs are [n, b, w]; a mask's True hides, here as there."""
        if call.get("bias_k") is not None or call.get("add_zero_attn") or call["query"].dim() != 3:
            return
        h, width = call["num_heads"], call["embed_dim_to_check"]
        if call.get("use_separate_proj_weight"):
            weight_q, weight_k = call["q_proj_weight"], call["k_proj_weight"]
        else:
            weight_q, weight_k, _ = call["in_proj_weight"].chunk(3)
        bias = call.get("in_proj_bias")
        bias_q, bias_k, _ = (None, None, None) if bias is None else bias.chunk(3)
        q_nbw = F.linear(call["query"].to(weight_q.dtype), weight_q, bias_q)
        k_mbw = F.linear(call["key"].to(weight_k.dtype), weight_k, bias_k)
        q_bhnd, k_bhmd = (x.unflatten(-1, (h, -1)).permute(1, 2, 0, 3) for x in (q_nbw, k_mbw))
        b, _, n, _ = q_bhnd.shape
        m = k_bhmd.shape[2]
        sequence_h, row_r, counts_hr = self._drawn(b, h, n, q_bhnd.device)
        scores = _scores(q_bhnd, k_bhmd, sequence_h, row_r, (width // h) ** -0.5)
        visible = torch.ones_like(scores, dtype=torch.bool)
        mask, padding = call.get("attn_mask"), call.get("key_padding_mask")
        if mask is not None:
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (b, -1))
            told = _of_heads(mask[:, :, row_r], sequence_h)
            scores, visible = _told(scores, visible, ~told if told.dtype == torch.bool else told)
        elif call.get("is_causal"):
            visible = visible & (torch.arange(m, device=scores.device) <= row_r[:, None])
        if padding is not None:
            told = _of_heads(padding[:, None, None], sequence_h)
            scores, visible = _told(scores, visible, ~told if told.dtype == torch.bool else told)
        self._keep("multi_head_attention_forward", scores, visible, counts_hr)

    # ---- attention written out ----

    def _look_at_softmax(self, scores: Tensor) -> None:
        valid_bn = self.running[-1][1]
        if not scores.is_floating_point():
            return
        if scores.dim() == 3 and valid_bn is not None and scores.shape[0] % valid_bn.shape[0] == 0:
            scores = scores.unflatten(0, (valid_bn.shape[0], -1))
        if scores.dim() != 4 or (valid_bn is not None and scores.shape[2] != valid_bn.shape[1]):
            return
        b, h, n, _ = scores.shape
        sequence_h, row_r, counts_hr = self._drawn(b, h, n, scores.device)
        sampled = scores[sequence_h, torch.arange(h, device=scores.device)][:, row_r]
        self._keep("softmax", sampled, _above_the_floor(sampled), counts_hr)

    def _drawn(self, b: int, h: int, n: int, device: torch.device) -> tuple[Tensor, ...]:
        valid = self.running[-1][1]
        fits = valid is not None and tuple(valid.shape) == (b, n)
        return self.sample.draw(b, h, n, valid if fits else None, device)


class _Mode(TorchFunctionMode):
    def __init__(self, probe: AttentionProbe) -> None:
        super().__init__()
        self._probe = probe

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ATTENTION:
            self._probe.see(func, args, kwargs)
        return func(*args, **kwargs)


_SOFTMAXES = frozenset({F.softmax, torch.softmax, torch.Tensor.softmax, torch.special.softmax})
_ATTENTION = _SOFTMAXES | {F.scaled_dot_product_attention, F.multi_head_attention_forward}


@without_autocast
def _scores(q_bhnd: Tensor, k_bgmd: Tensor, sequence_h: Tensor, row_r: Tensor, scale: float) -> Tensor:
    """[h, r, m] in working precision: the sampled rows of each head's own sequence."""
    dtype = working_dtype(q_bhnd.dtype)
    h, g = q_bhnd.shape[1], k_bgmd.shape[1]
    heads = torch.arange(h, device=q_bhnd.device)
    q_hrd = q_bhnd[sequence_h, heads][:, row_r].to(dtype)
    k_hmd = k_bgmd[sequence_h.expand(h), heads // (h // g)].to(dtype)
    return q_hrd @ k_hmd.mT * scale


def _kernel_scores(call: Call, sequence_h: Tensor, row_r: Tensor) -> Tensor:
    """What `_scores` is, of a performer: [h, r, m]."""
    assert isinstance(call.spec.weights, Performer)
    assert call.projection is not None
    _, h, g, _, m = call.sizes
    heads = torch.arange(h, device=call.q.device)
    q = call.q[sequence_h, heads][:, row_r].unsqueeze(0)
    k = call.k[sequence_h.expand(h), heads // (h // g)].unsqueeze(0)
    dtype = working_dtype(q.dtype)
    everything = torch.ones((), dtype=torch.bool, device=q.device).expand(1, h, len(row_r), m)
    return kernel_scores(
        call.spec.weights.kernel, call.projection, q.to(dtype), k.to(dtype), call.scale, everything
    ).squeeze(0)


def _of_heads(x_bhrm: Tensor, sequence_h: Tensor) -> Tensor:
    """Each head's own sequence of a tensor [1|b, 1|h, r, m]: [h, r, m]."""
    h = sequence_h.shape[0]
    batch = sequence_h if x_bhrm.shape[0] > 1 else torch.zeros_like(sequence_h)
    heads = torch.arange(h, device=x_bhrm.device) if x_bhrm.shape[1] > 1 else torch.zeros_like(sequence_h)
    return x_bhrm[batch, heads]


def _told(scores: Tensor, visible: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and visibility after a mask: bool (True = attend), or added."""
    if told.dtype == torch.bool:
        return scores, visible & told
    visible = visible & _above_the_floor(told)
    return scores + told.to(scores.dtype).masked_fill(~visible, 0.0), visible


FLOOR = -9e3
"""An added mask below this hides a key, and so does a masked score: -1e4 and -1e9 are common masks beside the dtype's
minimum. Where attention is written out, a real score that low would be taken for a hidden one."""


def _above_the_floor(x: Tensor) -> Tensor:
    return x > max(torch.finfo(x.dtype).min / 2, FLOOR)
