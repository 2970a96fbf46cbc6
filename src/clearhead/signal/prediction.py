"""Carry the moments through a whole model: forward from the embedding, backward from the last stream. No torch.

Each step is a function of `clearhead.signal.moments`; this file only knows in which order a transformer applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from clearhead.signal.collector import uncollected
from clearhead.signal.moments.attention import AttentionMoments, attention
from clearhead.signal.moments.attention_backward import AttentionGradients, attention_backward
from clearhead.signal.moments.dropout import dropout, dropout_backward
from clearhead.signal.moments.embedding import embedding
from clearhead.signal.moments.feed_forward import feed_forward, feed_forward_backward, feed_forward_gradients
from clearhead.signal.moments.linear import linear
from clearhead.signal.moments.norm import normalise, normalise_backward
from clearhead.signal.moments.positions import PositionGradient, Profile
from clearhead.signal.moments.residual import residual, residual_backward, scaled
from clearhead.signal.moments.types import GradientMoments, Moments
from clearhead.signal.skeleton import AttentionShape, Skeleton, Stack, SubLayer
from clearhead.signal.trace import Tap, Trace

UNIT = GradientMoments(1.0, 0.0)

LIMIT = 1 << 30
"""Width at which norms act. A norm alone, on a fresh Gaussian input of width d, has corrections of
order 1/d: it removes two directions, and its divisor fluctuates. In a stack they do not multiply up: the next norm
removes nearly the same directions again, and the size of a normed stream does not fluctuate. So the wide limit is
taken."""

Gradient = GradientMoments | PositionGradient
"""What travels back: two numbers for all tokens, or, in a causal stack, numbers by token."""


@uncollected()
def predict_skeleton(
    skeleton: Skeleton, *, output_gradient: GradientMoments = UNIT, sequences: int = 1, source: str = "predicted"
) -> Trace:
    """Return the predicted trace of a skeleton.

    Args:
        skeleton: from `clearhead.signal.describe`.
        output_gradient: gradient of the loss by the stream after the last layer (the decoder's, when there are two
            stacks), before a final norm. The default, variance 1 without correlation, is the hardest case for
            residual schemes; a measured one makes the absolute size of the gradients comparable.
        sequences: how many independent sequences a parameter's gradient is summed over.
    """
    context: Moments | None = None
    passes: list[_Pass] = []
    for stack in skeleton.stacks:
        passes.append(_Pass(stack, skeleton, context))
        context = passes[-1].forward()

    gradient = output_gradient
    for run in reversed(passes):
        wanted = run.backward(gradient, sequences)
        if wanted is not None:  # what cross attention asks of the encoder, behind its final norm
            encoder = passes[0]
            gradient = encoder.behind_final_norm(wanted)

    taps = [tap for run in passes for tap in run.taps]
    if skeleton.head is not None and context is not None:
        logits = linear(scaled(context, skeleton.head_scale), skeleton.head)
        taps.append(Tap("logits", passes[-1].stack.name, None, "logits", "logits", logits))
    facts = {"tokens": skeleton.tokens, "sequences": sequences, "training": skeleton.training}
    return Trace(source=source, taps=tuple(taps), notes=skeleton.notes, facts=facts)


@dataclass
class _Step:
    """What the backward pass needs of one sub-layer."""

    sublayer: SubLayer
    input: Moments
    read: Moments
    """What the branch reads."""
    branch: Moments
    """What its last matrix answers."""
    sum: Moments
    stream_scale: float
    attention: AttentionMoments | None
    profile: Profile | None
    """Causal stacks: of what the norm reads."""
    taps: Mapping[str, int]
    """Place -> index of its tap."""


@dataclass
class _Pass:
    """One stack, forward and then backward."""

    stack: Stack
    skeleton: Skeleton
    context: Moments | None
    drafts: list[dict[str, Any]] = field(default_factory=list)
    """The taps' fields while they are being filled."""
    steps: list[list[_Step]] = field(default_factory=list)
    last: Moments | None = None
    omega: float = 1.0
    """Admin's running ratio: sqrt(1 + sum of the branch variances so far)."""
    profile: Profile | None = None
    """Causal stacks: of the stream."""

    def forward(self) -> Moments:
        """Fill the taps; return what the stack hands on (behind its final norm)."""
        stack, skeleton = self.stack, self.skeleton
        if self._causal:
            self.profile = Profile.even(skeleton.tokens)
        x = self._embed()
        self._tap(None, "embedding", "embedding", x)
        for index, layer in enumerate(stack.layers):
            steps = []
            entry = x
            for sublayer in layer:
                step, x = self._sublayer(index, sublayer, x, entry if stack.parallel else x)
                steps.append(step)
            self.steps.append(steps)
        self.last = x
        self._tap(None, "output", "output", x)
        if stack.final_norm is not None:
            x = normalise(x, LIMIT, stack.final_norm)
            self._tap(None, "output", "normed", x)
        return x

    def backward(self, g: GradientMoments, sequences: int) -> GradientMoments | None:
        """Fill in the gradients; return the gradient by the context, if any sub-layer read it."""
        by_context: GradientMoments | None = None
        self._give(self._index("output"), g)
        flow: Gradient = PositionGradient.even(self.skeleton.tokens, g) if self._causal else g
        for layer in reversed(self.steps):
            if self.stack.parallel:
                by_stream, branches = flow, []
                for step in reversed(layer):
                    by_stream, by_branch, _ = self._back(step, by_stream, sequences)
                    branches.append(by_branch)
                flow = by_stream
                for by_branch in branches:
                    flow = _add(flow, by_branch)
                for step in layer:
                    self._give(step.taps["input"], flow)
                continue
            for step in reversed(layer):
                by_stream, by_branch, wanted = self._back(step, flow, sequences)
                flow = _add(by_stream, by_branch)
                self._give(step.taps["input"], flow)
                if wanted is not None:
                    by_context = wanted if by_context is None else by_context + wanted
        self._give(self._index("embedding"), flow)
        return by_context

    def behind_final_norm(self, g: GradientMoments) -> GradientMoments:
        """From the gradient by what the stack hands on to the gradient by its last stream."""
        if self.stack.final_norm is None or self.last is None:
            return g
        self._give(self._index("normed"), g)
        return normalise_backward(g, self.last, LIMIT, self.stack.final_norm)

    @property
    def taps(self) -> list[Tap]:
        """What was found so far."""
        return [Tap(**draft) for draft in self.drafts]

    @cached_property
    def _causal(self) -> bool:
        return any(_is_causal(sublayer) for layer in self.stack.layers for sublayer in layer)

    def _embed(self) -> Moments:
        table = self.stack.embedding
        first, *others = table.variances
        x = embedding((first * table.scale**2, *others), table.correlations)
        if table.norm is not None:
            x = normalise(x, LIMIT, table.norm)
        return dropout(x, table.dropout) if self.skeleton.training else x

    def _sublayer(self, index: int, sublayer: SubLayer, x: Moments, entry: Moments) -> tuple[_Step, Moments]:
        """One sub-layer on the stream `x`; `entry` is what a parallel layer's branches read."""
        training = self.skeleton.training
        taps = {"input": self._tap(index, sublayer.part, "input", entry)}
        read = entry
        if sublayer.placement == "pre" and sublayer.norm is not None:
            read = normalise(entry, LIMIT, sublayer.norm)
            taps["normed"] = self._tap(index, sublayer.part, "normed", read)
        found: AttentionMoments | None = None
        if isinstance(sublayer.branch, AttentionShape):
            found = self._attend(sublayer.branch, read)
            branch = found.output
        else:
            branch = feed_forward(read, sublayer.branch, training)
        taps["branch"] = self._tap(index, sublayer.part, "branch", branch)
        added = branch if sublayer.branch_norm is None else normalise(branch, LIMIT, sublayer.branch_norm)
        added = dropout(added, sublayer.dropout) if training else added
        scale = self.omega if sublayer.stream_scale is None else sublayer.stream_scale
        total = residual(x, added, scale, sublayer.branch_scale)
        share = sublayer.branch_scale**2 * added.variance / total.variance if total.variance > 0.0 else 0.0
        self._change(taps["branch"], share=share, attention=None if found is None else found.stats)
        if sublayer.stream_scale is None:
            self.omega = (scale**2 * x.variance + added.variance) ** 0.5
        before = self.profile
        if self.profile is not None:
            own = Profile.even(self.skeleton.tokens) if found is None else _mix_profile(found)
            self.profile = self.profile.mixed(scale**2 * x.variance, own, sublayer.branch_scale**2 * added.variance)
        post = sublayer.placement == "post" and sublayer.norm is not None
        profile = self.profile if post else before
        step = _Step(sublayer, entry, read, branch, total, scale, found, profile, taps)
        if post and sublayer.norm is not None:
            taps["sum"] = self._tap(index, sublayer.part, "sum", total)
            total = normalise(total, LIMIT, sublayer.norm)
            if self.profile is not None:
                self.profile = Profile.even(self.skeleton.tokens)
        return step, total

    def _attend(self, shape: AttentionShape, x: Moments) -> AttentionMoments:
        skeleton = self.skeleton
        if not shape.cross:
            return attention(x, shape, width=skeleton.width, tokens=skeleton.tokens, training=skeleton.training)
        return attention(
            x,
            shape,
            width=skeleton.width,
            tokens=skeleton.tokens,
            training=skeleton.training,
            context=self.context,
            context_tokens=skeleton.tokens,
        )

    def _back(self, step: _Step, g: Gradient, sequences: int) -> tuple[Gradient, Gradient, GradientMoments | None]:
        """Gradients by the stream's direct path, through the branch, and by the context."""
        sublayer, training = step.sublayer, self.skeleton.training
        if sublayer.placement == "post" and sublayer.norm is not None:
            norm = sublayer.norm
            g = _divided(_through(g, lambda h: normalise_backward(h, step.sum, LIMIT, norm)), step.profile)
            self._give(step.taps["sum"], g)
        by_stream = _through(g, lambda h: residual_backward(h, step.stream_scale, sublayer.branch_scale)[0])
        by_branch = _through(g, lambda h: residual_backward(h, step.stream_scale, sublayer.branch_scale)[1])
        if training:
            by_branch = _through(by_branch, lambda h: dropout_backward(h, sublayer.dropout))
        if sublayer.branch_norm is not None:
            after = sublayer.branch_norm
            by_branch = _through(by_branch, lambda h: normalise_backward(h, step.branch, LIMIT, after))
        by_read, wanted, matrices = self._branch_backward(step, by_branch)
        norms = {name: (sequences * square) ** 0.5 for name, square in matrices.items()}
        self._change(
            step.taps["branch"],
            backward=_moments(by_branch),
            parameter_gradient=sum(norm**2 for norm in norms.values()) ** 0.5,
            matrix_gradients=norms,
        )
        if "normed" in step.taps:
            self._give(step.taps["normed"], by_read)
            before = sublayer.norm
            assert before is not None
            by_read = _through(by_read, lambda h: normalise_backward(h, step.input, LIMIT, before))
            by_read = _divided(by_read, step.profile)
        return by_stream, by_read, wanted

    def _branch_backward(self, step: _Step, g: Gradient) -> tuple[Gradient, GradientMoments | None, dict[str, float]]:
        """Gradients by what the branch read, by the context, and of its matrices."""
        branch, training, mean = step.sublayer.branch, self.skeleton.training, _moments(g)
        if step.attention is not None:
            found = attention_backward(mean, step.attention)
            by_read: Gradient = found.input
            if isinstance(g, PositionGradient):
                by_read = _by_position(g, step.attention, found)
            return by_read, found.context, dict(found.matrices)
        assert not isinstance(branch, AttentionShape)
        matrices = feed_forward_gradients(mean, step.read, branch, self.skeleton.tokens, training)
        return _through(g, lambda h: feed_forward_backward(h, step.read, branch, training)), None, matrices

    def _tap(self, layer: int | None, part: str, place: str, forward: Moments) -> int:
        stack = self.stack.name
        name = f"{stack}.{place}" if layer is None else f"{stack}.{layer}.{part}.{place}"
        self.drafts.append(
            {"name": name, "stack": stack, "layer": layer, "part": part, "place": place, "forward": forward}
        )
        return len(self.drafts) - 1

    def _index(self, place: str) -> int:
        """Of a place of the whole stack."""
        return next(i for i, draft in enumerate(self.drafts) if draft["layer"] is None and draft["place"] == place)

    def _give(self, index: int, g: Gradient) -> None:
        self._change(index, backward=_moments(g))

    def _change(self, index: int, **values: object) -> None:
        self.drafts[index].update(values)


def _is_causal(sublayer: SubLayer) -> bool:
    return isinstance(sublayer.branch, AttentionShape) and sublayer.branch.causal and not sublayer.branch.cross


def _moments(g: Gradient) -> GradientMoments:
    return g.moments if isinstance(g, PositionGradient) else g


def _through(g: Gradient, backward: Callable[[GradientMoments], GradientMoments]) -> Gradient:
    """Behind a map that acts on each token alone."""
    return g.through(backward) if isinstance(g, PositionGradient) else backward(g)


def _divided(g: Gradient, profile: Profile | None) -> Gradient:
    return g.divided(profile) if isinstance(g, PositionGradient) and profile is not None else g


def _mix_profile(found: AttentionMoments) -> Profile:
    setting = found.setting
    if not setting.shape.causal or setting.shape.cross:
        return Profile.even(setting.queries)
    shared, own = setting.value_parts
    squares = found.flow.squares * (1.0 - setting.dropout) / found.flow.sum_overlap
    return Profile.of_mix(setting.keys, shared=shared, own=own, squares=squares)


def _add(one: Gradient, other: Gradient) -> Gradient:
    """Where two uncorrelated paths meet; both are of one kind within a stack."""
    if isinstance(one, PositionGradient):
        assert isinstance(other, PositionGradient)
        return one + other
    assert isinstance(other, GradientMoments)
    return one + other


def _by_position(g: PositionGradient, forward: AttentionMoments, found: AttentionGradients) -> PositionGradient:
    """The gradient by what attention read, by token: the value path in full, the score paths by their means."""
    shape, flow = forward.setting.shape, forward.flow
    if shape.cross:  # keys and values lead to the context
        return g.shaped(found.query_path)
    if not shape.causal:
        return PositionGradient.even(forward.setting.keys, found.input)
    values = g.through_values(
        squares=flow.squares,
        overlap=flow.overlap,
        dropped=forward.setting.dropout,
        sum_square=flow.sum_square,
        sum_overlap=flow.sum_overlap,
    )
    gain = shape.output.fan_out * shape.output.variance * shape.heads * shape.head_dim * shape.value.variance
    temperature = forward.setting.temperature
    mean2 = temperature.value_mean**2
    own = values.times(GradientMoments(gain * (mean2 + temperature.value_variance), gain * mean2))
    # A query's gradient is that of its own output; keys are read as values are.
    return own.plus(found.query_path, g).plus(found.key_path, own)
