"""The hooks of a measurement: where they sit, and what they add up.

Legend: b batch, t tokens, w width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.anatomy.parts import Anatomy, AttentionParts, StackParts, SubLayerParts
from clearhead.anatomy.search import matrices_of
from clearhead.errors import UserError
from clearhead.signal.attention_probe import AttentionProbe
from clearhead.signal.batch import Prepared
from clearhead.signal.taps import Seen, effective_ranks, forward_sums, gradient_of, gradient_sums, gram, moments_of
from clearhead.signal.trace import Tap


@dataclass
class _Slot:
    """One tap while it is being filled; sums are tensors, so that nothing waits for the device."""

    name: str
    stack: str
    layer: int | None
    part: str
    place: str
    sublayer: SubLayerParts | None = None
    calls: int = 0
    order: int = 0
    width: int = 0
    forward: Tensor | None = None
    backward: Tensor | None = None
    gram: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)


class Watcher:
    """Sets hooks by an anatomy, adds up what they see, and makes taps of it."""

    def __init__(
        self,
        anatomy: Anatomy,
        prepared: Prepared,
        probe: AttentionProbe,
        *,
        rows: int,
        backward: bool,
        taps: frozenset[str],
        seed: int,
    ) -> None:
        self._anatomy, self._prepared, self._probe = anatomy, prepared, probe
        self._rows, self._backward, self._wanted, self._seed = rows, backward, taps, seed
        self._slots: list[_Slot] = []
        self._seen: dict[str, Seen] = {}
        self._valid: dict[str, Tensor] = {}
        self._forward_runs = False
        self._clock = 0
        self._notes: list[str] = list(anatomy.notes)

    # ---- setting ----

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks are set inside the `with` block only, whatever ends it."""
        with ExitStack() as held:
            for stack in self._anatomy.stacks:
                self._set_stack(stack, held)
            self._set_logits(held)
            self._forward_runs = True
            yield

    def _set_stack(self, stack: StackParts, held: ExitStack) -> None:
        first, last = stack.blocks[0], stack.blocks[-1]
        embedding = self._slot(stack, None, "embedding", "embedding")
        _on_input(held, first.module, partial(self._enter_stack, stack))
        _on_input(held, first.module, partial(self._see, embedding, stack))
        before: nn.Module | None = None
        for index, block in enumerate(stack.blocks):
            for number, sub in enumerate(block.sublayers):
                start = block.module if number == 0 else None
                self._set_sublayer(stack, index, sub, start, before, held)
                before = sub.norm if sub.placement == "post" else None
        output = self._slot(stack, None, "output", "output")
        _on_output(held, last.module, partial(self._see, output, stack))
        if stack.final_norm is not None:
            normed = self._slot(stack, None, "output", "normed")
            _on_output(held, stack.final_norm, partial(self._see, normed, stack))

    def _set_sublayer(
        self,
        stack: StackParts,
        layer: int,
        sub: SubLayerParts,
        block: nn.Module | None,
        before: nn.Module | None,
        held: ExitStack,
    ) -> None:
        branch = sub.branch
        stream = self._slot(stack, layer, sub.part, "input", sub)
        see_stream = partial(self._see, stream, stack)
        if sub.placement == "pre" and sub.norm is not None:
            _on_input(held, sub.norm, see_stream)
            normed = self._slot(stack, layer, sub.part, "normed", sub)
            _on_output(held, sub.norm, partial(self._see, normed, stack))
        elif block is not None:
            _on_input(held, block, see_stream)
        elif before is not None:
            _on_output(held, before, see_stream)
        else:
            _on_input(held, branch.module, see_stream)
        answer = self._slot(stack, layer, sub.part, "branch", sub)
        if isinstance(branch, AttentionParts):
            held.callback(branch.module.register_forward_pre_hook(partial(self._enter, branch, stack)).remove)
            held.callback(branch.module.register_forward_hook(self._leave).remove)
            # torch.nn.MultiheadAttention multiplies by its output matrix without calling the module.
            whole = isinstance(branch.module, nn.MultiheadAttention)
            last = branch.module if whole else branch.output.module
        else:
            last = branch.down.module
        _on_output(held, last, partial(self._see, answer, stack))
        if sub.placement == "post" and sub.norm is not None:
            total = self._slot(stack, layer, sub.part, "sum", sub)
            _on_input(held, sub.norm, partial(self._see, total, stack))

    def _set_logits(self, held: ExitStack) -> None:
        if self._anatomy.head is not None:
            stack = self._anatomy.stacks[-1]
            slot = _Slot("logits", stack.name, None, "logits", "logits")
            self._slots.append(slot)
            _on_output(held, self._anatomy.head.module, partial(self._see, slot, stack))

    def _slot(
        self, stack: StackParts, layer: int | None, part: str, place: str, sub: SubLayerParts | None = None
    ) -> _Slot:
        name = f"{stack.name}.{place}" if layer is None else f"{stack.name}.{layer}.{part}.{place}"
        slot = _Slot(name, stack.name, layer, part, place, sub)
        self._slots.append(slot)
        return slot

    # ---- seeing ----

    def _enter_stack(self, stack: StackParts, x: Tensor) -> None:
        """The first stream says how many sequences and tokens there are."""
        if stack.name in self._seen or not self._forward_runs:
            return
        if x.dim() != 3:
            raise UserError(
                f"measure: expected a first stream [batch, tokens, width] in the {stack.name}, got shape "
                f"{tuple(x.shape)}"
            )
        b, t = x.shape[:2] if stack.batch_first else (x.shape[1], x.shape[0])
        if t < 2:
            raise UserError(
                f"measure: the {stack.name} reads sequences of a single token; correlations and attention need at "
                f"least two"
            )
        valid = self._prepared.valid.get(stack.name)
        if valid is not None and tuple(valid.shape) != (b, t):
            self._notes.append(
                f"{stack.name}: the mask of shape {tuple(valid.shape)} does not tell which of its {b} x {t} tokens are "
                f"padding; all were counted"
            )
            valid = None
        self._seen[stack.name] = Seen.of(b, t, valid, self._rows, self._seed, x.device)
        self._valid[stack.name] = torch.ones(b, t, dtype=torch.bool) if valid is None else valid.cpu()

    def _enter(self, branch: AttentionParts, stack: StackParts, module: nn.Module, args: Any) -> None:
        if self._forward_runs:
            self._probe.running.append((branch.path, self._valid.get(stack.name)))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._forward_runs:
            self._probe.running.pop()

    def _see(self, slot: _Slot, stack: StackParts, x: Tensor) -> None:
        if not self._forward_runs:
            return
        slot.calls += 1
        if slot.calls > 1:
            return
        self._clock += 1
        slot.order = self._clock
        if slot.place not in self._wanted:
            return
        seen = self._seen.get(stack.name)
        arranged = None if seen is None else _arrange(x, seen, stack)
        if arranged is None or seen is None:
            self._notes.append(f"{slot.name}: left out, its shape {tuple(x.shape)} is not [batch, tokens, width]")
            return
        slot.width = arranged.shape[2]
        slot.forward = forward_sums(arranged, seen)
        if "effective_rank" in self._wanted and slot.place in ("input", "output"):
            slot.gram = gram(arranged.detach(), seen)
        if self._backward and x.requires_grad:
            x.register_hook(partial(self._see_gradient, slot, stack, seen))

    def _see_gradient(self, slot: _Slot, stack: StackParts, seen: Seen, gradient: Tensor) -> None:
        arranged = _arrange(gradient, seen, stack)
        assert arranged is not None  # as the activation was
        slot.backward = gradient_sums(arranged, seen)

    def check(self) -> None:
        """After the forward pass: nothing is seen any more, and the anatomy must have been right."""
        self._forward_runs = False
        by_sublayer: dict[int, dict[str, _Slot]] = {}
        for slot in self._slots:
            if slot.sublayer is not None and slot.calls:
                by_sublayer.setdefault(id(slot.sublayer), {})[slot.place] = slot
        for places in by_sublayer.values():
            order = [places[place].order for place in ("input", "normed", "branch", "sum") if place in places]
            if order != sorted(order):
                first = next(iter(places.values()))
                raise RuntimeError(
                    f"{first.stack}.{first.layer}.{first.part}: its norm ran on the other side of the branch than the "
                    f"anatomy says ({first.sublayer.placement if first.sublayer else ''}); this is a mistake of "
                    f"clearhead's recogniser for {self._anatomy.family!r}"
                )

    @torch.no_grad()
    def take_parameters(self, gradients: Mapping[int, Tensor]) -> None:
        """Reduce the parameters' gradients, given by the parameter's id, to one norm for each matrix."""
        for slot in self._slots:
            if slot.place != "branch" or slot.sublayer is None:
                continue
            for role, matrix in matrices_of(slot.sublayer.branch).items():
                gradient = gradients.get(id(getattr(matrix.module, matrix.leaf)))
                if gradient is not None:
                    slot.gradients[role] = _norm(matrix.of(gradient))

    # ---- answering ----

    def taps(self) -> tuple[Tap, ...]:
        """Everything that was found, in the order of the computation of the blocks."""
        stats = self._probe.stats()
        numbers = _read([x for slot in self._slots for x in (slot.forward, slot.backward) if x is not None])
        norms = _read([x.reshape(1) for slot in self._slots for x in slot.gradients.values()])
        ranks = self._ranks()
        taps = []
        for slot in self._slots:
            if slot.forward is None:
                for _ in slot.gradients:
                    next(norms)
                continue
            seen = self._seen[slot.stack]
            forward = moments_of(next(numbers), seen, slot.width)
            backward = None if slot.backward is None else gradient_of(next(numbers), seen, slot.width)
            matrices = {role: next(norms)[0] for role in slot.gradients}
            attention = None
            if slot.place == "branch" and slot.sublayer is not None:
                attention = stats.get(slot.sublayer.branch.path)
            taps.append(
                Tap(
                    name=slot.name,
                    stack=slot.stack,
                    layer=slot.layer,
                    part=slot.part,
                    place=slot.place,
                    forward=forward,
                    backward=backward,
                    attention=attention,
                    parameter_gradient=sum(norm**2 for norm in matrices.values()) ** 0.5 if matrices else None,
                    matrix_gradients=matrices,
                    effective_rank=ranks.get(slot.name),
                )
            )
        return tuple(taps)

    def _ranks(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for stack in self._seen:
            slots = [slot for slot in self._slots if slot.stack == stack and slot.gram is not None]
            if slots:
                grams = torch.stack([slot.gram.cpu() for slot in slots if slot.gram is not None])
                ranks = effective_ranks(grams).mean(dim=-1).tolist()
                found |= {slot.name: rank for slot, rank in zip(slots, ranks, strict=True)}
        return found

    def notes(self) -> Iterator[str]:
        """What the reader of the trace must know."""
        yield from self._notes
        often = sorted({slot.calls for slot in self._slots if slot.calls > 1})
        if often:
            yield f"some modules ran {often[-1]} times in the forward pass; the first time is shown"
        silent = [slot.name for slot in self._slots if not slot.calls]
        if silent:
            yield f"{len(silent)} taps saw nothing in this forward pass, among them {silent[0]}"
        if "attention" in self._wanted:
            paths = [part.path for part in self._anatomy.attentions]
            missing = [path for path in paths if path not in self._probe.found]
            if missing:
                yield (
                    f"no statistics for {len(missing)} of {len(paths)} attentions, among them {missing[0]}: its scores "
                    f"pass neither clearhead's attend, nor scaled_dot_product_attention, nor a softmax"
                )
            if any(part.spec.startswith("self_adjust") for part in self._anatomy.attentions):
                yield "self_adjust: entropy is that of the absolute weights normalised to 1, the gain is the softmax's"
            yield f"attention and effective ranks: a sample of at most {self._rows} rows a head, or tokens a sequence"

    def facts(self) -> dict[str, Any]:
        """Sizes of the batch; of the last stack, and by stack where there are two."""
        last = self._seen[self._anatomy.stacks[-1].name]
        facts: dict[str, Any] = {"batch": last.batch, "tokens": last.tokens, "valid_tokens": last.count}
        if len(self._seen) > 1:
            facts["stacks"] = {name: {"tokens": s.tokens, "valid_tokens": s.count} for name, s in self._seen.items()}
        return facts


def _arrange(x: Tensor, seen: Seen, stack: StackParts) -> Tensor | None:
    """[b, t, w] out of what the model passes on, or None."""
    if x.dim() == 3 and not stack.batch_first:
        x = x.transpose(0, 1)
    if x.dim() == 2 and x.shape[0] == seen.batch * seen.tokens:
        x = x.unflatten(0, (seen.batch, seen.tokens))
    return x if x.dim() == 3 and tuple(x.shape[:2]) == (seen.batch, seen.tokens) else None


def _norm(gradient: Tensor) -> Tensor:
    """Frobenius norm in float32, safe for gradients whose square leaves its range."""
    g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    largest = g.abs().amax()
    return largest * (g / torch.where(largest > 0, largest, 1.0)).square().sum().sqrt()


def _read(tensors: list[Tensor]) -> Iterator[list[float]]:
    """All numbers in one wait for the device."""
    if not tensors:
        return iter(())
    return iter(torch.stack([x.double() if x.device.type != "mps" else x for x in tensors]).tolist())


def _tensor(value: Any) -> Tensor | None:
    """The first tensor of what a module receives or answers."""
    if isinstance(value, Tensor):
        return value
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((x for x in map(_tensor, values) if x is not None), None)


def _on_input(held: ExitStack, module: nn.Module, see: Callable[[Tensor], None]) -> None:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        x = _tensor(args)
        x = _tensor(kwargs) if x is None else x
        if x is not None:
            see(x)

    held.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _on_output(held: ExitStack, module: nn.Module, see: Callable[[Tensor], None]) -> None:
    def hook(_: nn.Module, args: Any, output: Any) -> None:
        x = _tensor(output)
        if x is not None:
            see(x)

    held.callback(module.register_forward_hook(hook).remove)
