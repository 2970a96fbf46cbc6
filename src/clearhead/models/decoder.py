"""The decoder-only transformer: a `Stack` whose tokens see what stands before them.

Legend: b batch, t tokens, w width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clearhead.errors import UserError
from clearhead.memory.layout import MemoryLayout
from clearhead.memory.stream import SegmentStream
from clearhead.memory.transformer_xl import SegmentMemory
from clearhead.models.config import ModelConfig
from clearhead.models.places import causal_geometry, check_inputs
from clearhead.models.recall import Reach, recall_geometries
from clearhead.models.stack import Stack
from clearhead.models.state import DecoderState


class Decoder(Stack):
    """A causal language model as `config` describes it; parameters start as `init_parameters(0)` draws them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, layers=config.layers)
        self.init_parameters(0)

    def forward(
        self,
        tokens_bt: Tensor,
        *,
        segments: Tensor | None = None,
        valid: Tensor | None = None,
        state: DecoderState | SegmentStream | None = None,
        memory: SegmentMemory | None = None,
    ) -> Tensor:
        """Return next-token logits [b, t, V], fp32 or better (under autocast the last product is taken in its dtype).

        Args:
            tokens_bt: token ids, integer [b, t].
            segments: [b, t] int; a document is a run of equal numbers, attention stays inside it and positions restart.
            valid: [b, t] bool, False = padding on the left or right of a row. Logits at padding mean nothing.
            state: from `new_state` or `new_stream`; these tokens follow those it holds, and are appended. No gradients.
            memory: from `new_memory`; these tokens are the next segment of its streams. They look back on it, and their
                layer inputs are then put into it, detached. A row's first document goes on from the segment before when
                `segments` gives it the same number, or is None.

        Raises `ValueError` when shapes, dtypes or lengths do not fit, with what was expected.
        """
        check_inputs(self.config, tokens_bt, segments, valid, state)
        layout = self.config.memory_layout
        if isinstance(state, SegmentStream):
            return self._stream(tokens_bt, segments, valid, memory, state)
        if memory is None and layout is not None:
            if state is not None:
                raise ValueError("state: a model with memory decodes with new_stream, not with new_state")
            if layout.windowed:  # windows bound what a layer sees of a first segment too
                memory = self.new_memory(tokens_bt.shape[0], device=tokens_bt.device)
        if memory is not None:
            if state is not None:
                raise ValueError("memory with a state: give one of them; new_stream decodes with a memory")
            return self._recall(tokens_bt, segments, valid, memory)
        geometry = causal_geometry(
            self.config, self.relative, tokens_bt, segments, valid, state, dtype=self.angle_dtype
        )
        x_btw = self.embed(tokens_bt, geometry)
        return self.logits(self.transform(x_btw, geometry, None if state is None else state.caches))

    def new_state(
        self, batch: int, capacity: int, *, dtype: torch.dtype | None = None, device: Any = None
    ) -> DecoderState:
        """Empty caches for `batch` rows of up to `capacity` tokens.

        dtype: None = what the projections will answer in: the autocast dtype inside autocast, else the parameters' own.
        """
        return DecoderState(self.new_caches(batch, capacity, dtype, device))

    def new_memory(self, batch: int, layout: MemoryLayout | str | None = None, *, device: Any = None) -> SegmentMemory:
        """An empty memory for `batch` streams.

        layout: how much each layer remembers, see `clearhead.memory.layout`; None = the config's. No parameter hangs on
            it, so a model may remember more in evaluation than it did in training.

        Raises `ValueError` when the config has no memory and none is given, or cannot look back on one.
        """
        config = self.config
        refused = config.refuses_memory
        if refused is not None:
            raise UserError(f"memory: {refused}")
        layout = config.memory_layout if layout is None else MemoryLayout.parse(layout)
        if layout is None:
            raise ValueError(
                "memory: this model's config has none; say how much, such as new_memory(batch, 'full:512')"
            )
        weight = self.embedding.weight
        return SegmentMemory(
            layout.lengths(config.layers, config.context),
            batch,
            config.width,
            windowed=layout.windowed,
            dtype=weight.dtype,
            device=weight.device if device is None else device,
        )

    def new_stream(
        self, batch: int, layout: MemoryLayout | str | None = None, *, segment: int | None = None, device: Any = None
    ) -> SegmentStream:
        """What decoding with a memory needs: `model(tokens, state=stream)`, for ever, in bounded space.

        segment: tokens between two updates of the memory, as in training; None = the config's context.
        """
        return SegmentStream(
            self.new_memory(batch, layout, device=device), self.config.context if segment is None else segment
        )

    def _recall(
        self, tokens_bt: Tensor, segments: Tensor | None, valid: Tensor | None, memory: SegmentMemory
    ) -> Tensor:
        self._check_memory(tokens_bt, memory)
        order_bt = None
        if valid is not None:  # real tokens first: then slots next to each other are tokens next to each other
            order_bt = (~valid).to(torch.int8).argsort(dim=1, stable=True)
            tokens_bt, valid = tokens_bt.gather(1, order_bt), valid.gather(1, order_bt)
            segments = None if segments is None else segments.gather(1, order_bt)
        entered = memory.enter(tokens_bt.shape[1], segments, valid)
        geometries = recall_geometries(
            self.config,
            self.relative,
            entered,
            memory.document,
            memory.place,
            [
                Reach(x.shape[1], window=length if memory.windowed else None)
                for x, length in zip(memory.inputs, memory.lengths, strict=True)
            ],
            dtype=self.angle_dtype,
        )
        inputs: list[Tensor] = []
        x_btw = self.transform(
            self.embed(tokens_bt, geometries[0]), geometries, past=_some(memory.inputs), inputs=inputs
        )
        memory.push(inputs, entered)
        if order_bt is not None:
            x_btw = x_btw.gather(1, order_bt.argsort(dim=1)[..., None].expand_as(x_btw))
        return self.logits(x_btw)

    def _stream(
        self,
        tokens_bt: Tensor,
        segments: Tensor | None,
        valid: Tensor | None,
        memory: SegmentMemory | None,
        stream: SegmentStream,
    ) -> Tensor:
        if segments is not None or valid is not None or memory is not None:
            raise ValueError(
                "state: a stream takes tokens alone: all rows go in step, one document each, with the stream's memory"
            )
        self._check_memory(tokens_bt, stream.memory)
        logits: list[Tensor] = []
        while tokens_bt.shape[1] or not logits:
            part_bt, tokens_bt = tokens_bt.tensor_split([stream.segment - stream.open], dim=1)
            logits.append(self._within_segment(part_bt, stream))
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)

    def _within_segment(self, tokens_bt: Tensor, stream: SegmentStream) -> Tensor:
        memory, before = stream.memory, stream.open
        entered = stream.enter(tokens_bt.shape[1])
        reaches = [
            Reach(
                x.shape[1] + before,
                kept=x.shape[1] + before if before else 0,
                window=length if memory.windowed else None,
            )
            for x, length in zip(memory.inputs, memory.lengths, strict=True)
        ]
        geometries = recall_geometries(
            self.config, self.relative, entered, *stream.places(), reaches, first=before, dtype=self.angle_dtype
        )
        inputs: list[Tensor] = []
        x_btw = self.transform(
            self.embed(tokens_bt, geometries[0]),
            geometries,
            stream.keys,
            past=None if before else _some(memory.inputs),
            inputs=inputs,
        )
        stream.take(inputs, entered)
        return self.logits(x_btw)

    def _check_memory(self, tokens_bt: Tensor, memory: SegmentMemory) -> None:
        config = self.config
        if config.refuses_memory is not None:
            raise UserError(f"memory: {config.refuses_memory}")
        have = (memory.batch, len(memory.lengths), memory.inputs[0].shape[-1])
        want = (tokens_bt.shape[0], config.layers, config.width)
        if have != want:
            raise ValueError(
                f"memory: expected {want[0]} rows, {want[1]} layers and width {want[2]}, got {have[0]}, {have[1]} and "
                f"{have[2]}; make it with new_memory"
            )


def _some(inputs: list[Tensor]) -> list[Tensor | None]:
    return [x if x.shape[1] else None for x in inputs]
