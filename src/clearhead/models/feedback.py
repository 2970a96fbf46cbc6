"""The Feedback Transformer (Fan et al., arXiv 2002.09402): a decoder whose every layer sees what all layers made of the
past.

    z_t^l = attention(x_t^l, [m_{t-window} .. m_{t-1}])       one list of memories for all layers, strictly past
    m_t   = sum_l softmax(w)_l x_t^l                          l = 0 the embedding .. L the output of the last block

So a token is run through all layers before the next begins: `tokens x layers` steps one after the other, in training
too. In return a layer sees the top of the past, and one vector per token is all that is remembered.

Where the paper or its code leaves a choice, and what is done here:

- Keys and values of a memory are made once and shared by all layers (`feedback_share_kv`, the paper's speed-up), or
  made by each layer's own matrices.
- Under pre-norm a memory passes one norm of its own on its way to keys and values, every time. The published code norms
  the memories that it carries from block to block twice. Under post-norm there is no such norm: block outputs are
  normed, and the embedding (l = 0) enters as it is.
- `feedback_start`: the first token sees nothing, and the output of its attention is 0; or a window of zero vectors is
  attended to ("zeros", as published), a sink that leaves the window token by token. A packed document begins anew.
- Gradients flow through memories inside a block of `feedback_block` tokens and stop at its border, where the carried
  memories are detached and projected again, so that key and value matrices still learn from them. Blocks are counted
  from a row's first real token, so padding does not move a border; every call with a state begins a block.

Legend: b batch, t tokens, w width, V vocabulary, n memories in the window, g key/value heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clearhead.attention.mask import Mask
from clearhead.attention.selective import selective
from clearhead.attention.spec import Selective
from clearhead.layers.attention import Source
from clearhead.layers.feedback import FeedbackAttention, MemoryMix, share_sources
from clearhead.layers.geometry import Geometry
from clearhead.layers.norms import make_norm
from clearhead.layers.position.ids import position_ids
from clearhead.layers.position.relative_key import RelativeKey
from clearhead.layers.position.rope import Rotation
from clearhead.memory.feedback import FeedbackState, Window
from clearhead.models.build import build_feedback_block
from clearhead.models.config import ModelConfig
from clearhead.models.places import check_inputs, position_bias, position_rotation, valid_range
from clearhead.models.stack import Stack


class FeedbackDecoder(Stack):
    """A causal language model with feedback memory as `config` describes it; parameters start as
    `init_parameters(0)` draws them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, layers=config.layers, make_block=build_feedback_block)
        if config.feedback_share_kv:
            share_sources(self.blocks)
        self.mix = MemoryMix(config.layers)
        pre = config.norm_placement == "pre"
        self.memory_norm = make_norm(config.norm, config.width) if pre else nn.Identity()
        relative = config.position == "relative_key"
        self.relative_key = RelativeKey(config.feedback_window, config.head_size) if relative else None
        self.init_parameters(0)

    def forward(
        self,
        tokens_bt: Tensor,
        *,
        segments: Tensor | None = None,
        valid: Tensor | None = None,
        state: FeedbackState | None = None,
    ) -> Tensor:
        """Return next-token logits [b, t, V], fp32 or better.

        Args:
            tokens_bt: token ids, integer [b, t].
            segments: [b, t] int; a document is a run of equal numbers: it sees its own memories, positions restart.
                With a state, a row's first document goes on from the call before when it has the same number.
            valid: [b, t] bool, False = padding on the left or right of a row. Logits at padding mean nothing.
            state: from `new_state`; these tokens follow those it has read, and it is brought up to date. What it holds
                carries no gradient, so a state may also be carried from one training step to the next.

        Raises `ValueError` when shapes, dtypes or lengths do not fit, with what was expected.
        """
        check_inputs(self.config, tokens_bt, segments, valid, None if segments is not None else state)
        b, t = tokens_bt.shape
        device = tokens_bt.device
        if state is not None:
            self._check_state(state, b, t)
        turn_bt = count_b = None
        columns = t
        if valid is not None and not bool(valid.all()):
            # Each row is turned until its first real token stands first: then all padding is on the right.
            first_b, end_b = valid_range(valid)
            count_b = end_b - first_b
            columns = max(int(count_b.max()), 1)
            turn_bt = (torch.arange(t, device=device) + first_b[:, None]) % t
            tokens_bt = tokens_bt.gather(1, turn_bt)
            segments = None if segments is None else segments.gather(1, turn_bt)
        tokens_bt = tokens_bt[:, :columns]
        begins: list[Tensor | None] = [None] * columns
        if segments is not None:
            segments = segments[:, :columns]
            if count_b is not None:  # padding on the right belongs to what stands before it: it begins nothing
                last_b1 = (count_b - 1).clamp_min(0)[:, None]
                segments = segments.gather(1, torch.arange(columns, device=device).minimum(last_b1))
            begins = _beginnings(segments)
            if state is not None:
                state.enter(segments[:, 0], None if count_b is None else count_b > 0)
        if all(rows is None for rows in begins):
            segments = None  # one document a row
        positions = position_ids(columns, segments_bt=segments, device=device)
        if state is not None:  # what a row has read counts until another document begins
            read_bt = state.lengths[:, None]
            if segments is not None:
                read_bt = read_bt * (segments == segments[:, :1]).cumprod(dim=1)
            positions = positions + read_bt
        x_btw = self.embed(tokens_bt, Geometry(positions=positions, mask=Mask()))
        run = _Pass(self, b, positions, begins, count_b, state)
        outputs = [run.token(t, x_b1w) for t, x_b1w in enumerate(x_btw.split(1, dim=1))]
        run.finish(segments)
        logits_btV = self.logits(self.norm(torch.cat(outputs, dim=1)))
        if turn_bt is None:
            return logits_btV
        logits_btV = F.pad(logits_btV, (0, 0, 0, t - columns))
        back_bt = turn_bt.argsort(dim=1)
        return logits_btV.gather(1, back_bt[..., None].expand_as(logits_btV))

    def new_state(
        self, batch: int, capacity: int | None = None, *, dtype: torch.dtype | None = None, device: Any = None
    ) -> FeedbackState:
        """An empty state for `batch` rows. It holds the last `feedback_window` memories, whatever is read.

        capacity: tokens that are going to be read; only learned positions have an end, and are checked against it.
        dtype: of the memories; None = the parameters' own.
        """
        config, weight = self.config, self.embedding.weight
        if config.position == "learned" and capacity is not None and capacity > config.context:
            raise ValueError(
                f"capacity: {capacity} tokens, but learned positions end at context={config.context}; "
                f"ask for fewer, or use position='rope'"
            )
        return FeedbackState.allocate(
            batch,
            config.feedback_window,
            config.width,
            dtype=weight.dtype if dtype is None else dtype,
            device=weight.device if device is None else device,
        )

    def _check_state(self, state: FeedbackState, batch: int, tokens: int) -> None:
        config = self.config
        wanted = (batch, config.feedback_window, config.width)
        if state.memory.shape != wanted:
            raise ValueError(
                f"state: expected {wanted[0]} rows of {wanted[1]} memories of width {wanted[2]}, got "
                f"{tuple(state.memory.shape)}; make it with new_state"
            )
        if config.position == "learned":
            longest = state.equal_length
            longest = int(state.lengths.max()) if longest is None else longest
            if longest + tokens > config.context:
                raise ValueError(
                    f"tokens: {tokens} after {longest}, but learned positions end at context={config.context}; "
                    f"reset the state, or use position='rope'"
                )

    # ---- keys and values of memories ----

    def sources(self) -> list[FeedbackAttention]:
        """The attentions whose matrices make keys and values: the first block's, or every block's."""
        blocks = list(self.blocks)[: 1 if self.config.feedback_share_kv else None]
        return [cast(FeedbackAttention, block.attention) for block in blocks]

    def project(self, memory_bnw: Tensor, positions: Tensor, rotation: Rotation | None) -> list[Tensor]:
        """Keys and values [b, g, n, 2d] of memories, for each of `sources()`: normed, turned, times temperatures."""
        geometry = Geometry(positions=positions, mask=Mask(), rotation=rotation)
        normed_bnw = self.memory_norm(memory_bnw)
        answer = []
        for attention in self.sources():
            made = attention.read(normed_bnw, geometry)
            _, key, value = selective(
                made.key, made.key, made.value,
                key_temperature=made.key_temperature, value_temperature=made.value_temperature,
            )  # fmt: skip
            answer.append(torch.cat((key, value), dim=-1))
        return answer

    def made_by(self) -> Hashable:
        """What `project` depends on, to tell whether what it made is still right: weights and their versions."""
        parameters = [*self.memory_norm.parameters()]
        for attention in self.sources():
            parameters += [*attention.key.parameters(), *attention.value.parameters()]
            for module in (attention.key_norm, *_source_temperatures(attention)):
                parameters += [] if module is None else [*module.parameters()]
        if any(p.is_inference() for p in parameters):
            return object()  # tensors made in inference mode have no version to tell a write by: made anew each time
        kind = parameters[0].device.type
        cast_to = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return cast_to, tuple((id(p), p.data_ptr(), p._version, p.dtype) for p in parameters)


class _Pass:
    """One forward pass, token by token.

    `memory` and `fresh` are the memories since the last border: those carried over it, and those made after it. While
    all rows hold as many of one document, the pass reads only slots that hold something; otherwise (and with
    zeros to attend to) it reads `window` slots, and says by row where they begin.
    """

    def __init__(
        self,
        model: FeedbackDecoder,
        batch: int,
        positions: Tensor,
        begins: list[Tensor | None],
        count_b: Tensor | None,
        state: FeedbackState | None,
    ) -> None:
        config = model.config
        self.model, self.state, self.positions, self.count_b = model, state, positions, count_b
        self.begins = begins
        self.window, self.zeros = config.feedback_window, config.feedback_start == "zeros"
        self.shares = model.mix.shares()
        self.bias = position_bias(config, model.relative, positions.device)
        rotation = position_rotation(config, positions)
        self.rotations: list[Rotation | None] = [None] * positions.shape[1]
        if rotation is not None:
            pairs = zip(rotation.cos.split(1, dim=2), rotation.sin.split(1, dim=2), strict=True)
            self.rotations = [Rotation(cos, sin) for cos, sin in pairs]
        self.columns = positions.split(1, dim=1)
        self.spans = not torch.is_grad_enabled()  # no gradient to stop: a border changes nothing

        alone = all(rows is None for rows in begins)
        level = count_b is None and alone and (state is None or state.held is not None)
        self.ragged = not level and not self.zeros
        weight = model.embedding.weight
        held = self.window if self.ragged or self.zeros else 0
        if state is None:
            self.memory = weight.new_zeros(batch, held, config.width)
        else:
            if not held:
                assert state.held is not None
                held = state.held
            self.memory = state.memory[:, self.window - held :]
        self.fresh: list[Tensor] = []
        self.border = 0  # column of the last border
        self.windows: list[Window] | None = None
        self.waiting: list[tuple[int, Tensor]] = []  # a memory whose keys and values nobody has asked for yet
        self.made_by = model.made_by() if state is not None and self.spans else None
        if state is not None and self.made_by is not None:
            kept = state.projections(self.made_by)
            if kept is not None:
                cut = [t[:, :, t.shape[2] - held :] for t in kept]
                self.windows = [Window(t, self.window) for t in cut]

    def token(self, t: int, x_b1w: Tensor) -> Tensor:
        """Run the token of column t through all blocks and remember it; return the last block's output."""
        rows = self.begins[t]
        if t and t % self.model.config.feedback_block == 0:
            self._set_border(t)
        if rows is not None and self.zeros:
            self._restart(t, rows)
        sources, geometry = self._look(t)
        states = [x_b1w]
        for layer, block in enumerate(self.model.blocks):
            states.append(block(states[-1], geometry, sources[min(layer, len(sources) - 1)]))
        memory_b1w = self.model.mix(states, self.shares)
        self.fresh.append(memory_b1w)
        self.waiting.append((t, memory_b1w))
        return states[-1]

    def finish(self, segments_bt: Tensor | None) -> None:
        """Bring the state up to date; `segments_bt` only where a document begins after the first column."""
        if self.state is None:
            return
        t = self.positions.shape[1]
        projected = None
        if self.made_by is not None and self.count_b is None:  # rows that ended earlier have other newest slots
            self._project_waiting()
            assert self.windows is not None
            whole = [window.whole() for window in self.windows]
            missing = self.window - whole[0].shape[2]
            projected = self.made_by, [F.pad(kv, (0, 0, missing, 0)).contiguous() for kv in whole]
        memory_bnw = self._collected(t)
        memory_bnw = F.pad(memory_bnw, (0, 0, self.window - memory_bnw.shape[1], 0)).contiguous()
        entered = None
        if segments_bt is not None:
            entered = self.positions[:, -1] + 1, segments_bt[:, -1].clone()
            if self.count_b is not None:
                last_b1, some_b = (self.count_b - 1).clamp_min(0)[:, None], self.count_b > 0
                length_b = self.positions.expand_as(segments_bt).gather(1, last_b1)[:, 0] + 1
                entered = (
                    torch.where(some_b, length_b, self.state.lengths),
                    torch.where(some_b, segments_bt[:, -1], self.state.number),
                )
        self.state.advance(memory_bnw, t if self.count_b is None else self.count_b, projected, entered=entered)

    # ---- what it is made of ----

    def _look(self, t: int) -> tuple[list[Source], Geometry]:
        """What the token of column t sees, for each of the model's sources, and where it stands."""
        if self.windows is None:
            n = self.memory.shape[1]
            back = torch.arange(-n, 0, device=self.positions.device)
            positions = self.columns[t] + back
            rotation = position_rotation(self.model.config, positions)
            made = self.model.project(self.memory, positions, rotation)
            self.windows = [Window(kv, self.window) for kv in made]
        self._project_waiting()
        sources = []
        for window, attention in zip(self.windows, self.model.sources(), strict=True):
            key, value = window.read()
            if self.model.relative_key is not None:
                key = self.model.relative_key(key)
            # Keys and values have their temperatures already; where queries have none, `attend` is told so by a 1.
            one = None
            if attention.temperatures is not None and getattr(attention.temperatures, "query", self) is None:
                one = value.new_ones(1, 1, 1, 1)
            sources.append(Source(key, value, value_temperature=one))
        n = sources[0].key.shape[2]
        mask = Mask(offset=n)  # the query stands after the last memory
        if self.ragged:
            start_b = n - self.columns[t].clamp(max=n).flatten()
            mask = mask & Mask.key_range(start_b.expand(self.memory.shape[0]), None)
        visible = None
        if isinstance(self.model.config.spec.temperature, Selective):
            own = self.columns[t][:, None]
            visible = torch.full_like(own, n) if self.zeros else own.clamp(max=self.window)
        return sources, Geometry(
            positions=self.columns[t],
            mask=mask,
            visible=visible,
            bias=self.bias,
            rotation=self.rotations[t],
        )

    def _project_waiting(self) -> None:
        for t, memory_b1w in self.waiting:
            assert self.windows is not None
            made = self.model.project(memory_b1w, self.columns[t], self.rotations[t])
            for window, one in zip(self.windows, made, strict=True):
                window.append(one)
        self.waiting = []

    def _set_border(self, t: int) -> None:
        """Stop gradients here, and project what is carried over once more. Without gradients nothing is projected."""
        if self.spans:
            self._project_waiting()
            self.memory = self._collected(t)
        else:
            self.memory = self._collected(t).detach()
            self.windows, self.waiting = None, []
        self.fresh, self.border = [], t

    def _restart(self, t: int, rows_b: Tensor) -> None:
        """In the given rows the memory is a window of zeros again; gradients of the others go on."""
        self.memory = self._collected(t).masked_fill(rows_b[:, None, None], 0.0)
        self.windows, self.waiting, self.fresh, self.border = None, [], [], t

    def _collected(self, t: int) -> Tensor:
        """The last memories of each row before column t, up to `window` of them."""
        both_bnw = torch.cat((self.memory, *self.fresh), dim=1)
        if self.count_b is None:
            return both_bnw[:, max(both_bnw.shape[1] - self.window, 0) :]
        taken_b = (self.count_b - self.border).clamp(0, t - self.border)
        index_bn = taken_b[:, None] + torch.arange(self.window, device=both_bnw.device)
        return both_bnw.gather(1, index_bn[..., None].expand(-1, -1, both_bnw.shape[2]))


def _beginnings(segments_bt: Tensor) -> list[Tensor | None]:
    """For each column but the first the rows in which a document begins there, [b] bool; None where there is none."""
    begins_bt = segments_bt[:, 1:] != segments_bt[:, :-1]
    some = begins_bt.any(dim=0).tolist()
    return [None, *(rows if here else None for here, rows in zip(some, begins_bt.unbind(dim=1), strict=True))]


def _source_temperatures(attention: FeedbackAttention) -> Sequence[nn.Module | None]:
    temperatures: Any = attention.temperatures
    return [getattr(temperatures, name, None) for name in ("key", "value")]
