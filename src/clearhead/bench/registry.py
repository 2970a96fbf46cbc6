"""What can be measured, and who takes part. Imports no torch, so that `clearhead bench --list` answers at once.

A `Source` is where an implementation comes from: this library, PyTorch, the formula written out, another library. A
`Competitor` is one attention of a source at one setting. `module` names the file that builds it; see `prepared.py` for
what such a file offers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata

from clearhead.attention.spec import AttentionSpec, Full, Laser, Performer, SelfAdjust, Window


@dataclass(frozen=True)
class Operation:
    """One thing that is timed. `baseline` is the competitor whose time in the same round every ratio is taken to."""

    name: str
    title: str
    what: str
    baseline: str


OPERATIONS: dict[str, Operation] = {
    one.name: one
    for one in (
        Operation("forward", "Attention, forward", "causal attention without gradients", "torch sdpa"),
        Operation(
            "forward+backward",
            "Attention, forward and backward",
            "causal attention and the gradients of query, key, value and of temperatures where there are some",
            "torch sdpa",
        ),
        Operation(
            "decode", "Decode step", "one token is put into a cache that holds the others, and reads it", "torch sdpa"
        ),
        Operation(
            "step",
            "Whole training step",
            "forward, loss, backward, clipping and AdamW of a small decoder",
            "softmax",
        ),
    )
}  # fmt: skip

ATTENTION = ("forward", "forward+backward", "decode")
EVERYTHING = tuple(OPERATIONS)


@dataclass(frozen=True)
class Source:
    """Where an implementation comes from; `package` is what must be installed, `pip` how."""

    name: str
    module: str
    what: str
    package: str | None = None
    pip: str = ""

    @property
    def installed(self) -> bool:
        """Whether its package can be found; nothing is imported."""
        return self.package is None or importlib.util.find_spec(self.package) is not None

    @property
    def version(self) -> str | None:
        """The version of its package; None where it has none or is not here."""
        if self.package is None or not self.installed:
            return None
        try:
            return metadata.version(self.package.replace("_", "-"))
        except metadata.PackageNotFoundError:
            return "unknown"


_HERE = "clearhead.bench.sources"
SOURCES: dict[str, Source] = {
    one.name: one
    for one in (
        Source("torch", f"{_HERE}.sdpa", "torch.nn.functional.scaled_dot_product_attention, called directly"),
        Source("clearhead", f"{_HERE}.ours", "this library, by its spec"),
        Source(
            "written-out",
            f"{_HERE}.written_out",
            "the formula in plain torch: the whole matrix of scores, an operation after the other, the mask made once",
        ),
        Source(
            "compiled",
            f"{_HERE}.compiled",
            "the same through torch.compile (needs a C++ compiler; half a minute each), on request only",
        ),
        Source(
            "x-transformers",
            f"{_HERE}.x_transformers",
            "its own attention layer, with the projections taken out; in a training step its own decoder",
            package="x_transformers",
            pip="pip install 'clearhead[bench]'",
        ),
        Source(
            "transformers",
            f"{_HERE}.hugging_face",
            "the attention functions of Hugging Face's Llama, its caches, and Llama itself",
            package="transformers",
            pip="pip install 'clearhead[hf]'",
        ),
        Source(
            "nanogpt",
            f"{_HERE}.nano",
            "a GPT in plain torch, as nanoGPT writes one (LayerNorm, GELU, learned positions), in a plain loop",
        ),
    )
}

FAMILIES = ("softmax", "laser", "temperatures", "self_adjust", "window", "other")
"""The mechanisms, as tables and plots group them."""


@dataclass(frozen=True)
class Competitor:
    """One attention at one setting.

    `option` is what the source's module is told. `equals` is the spec of ours whose output (and gradients) this must
    reproduce before it is timed, `None` where the formula is another; `beside` is the competitor of ours that does the
    same work, if that is not the one called as `equals`; `note` says what a reader must know.
    """

    name: str
    source: str
    family: str
    option: str
    operations: tuple[str, ...]
    equals: str | None
    note: str = ""
    beside: str = ""
    default: bool = True

    @property
    def of(self) -> Source:
        """Its source."""
        return SOURCES[self.source]


DEFAULT_SPECS = (
    "softmax",
    "laser",
    "softmax+selective",
    "softmax+learned",
    "laser+selective",
    "self_adjust",
    "self_adjust:detach_extrema=true",
    "self_adjust:form=product",
    "softmax+window:256",
)
QUICK_SPECS = ("softmax", "laser", "softmax+selective", "self_adjust")
COMPILED_SPECS = ("softmax", "laser", "self_adjust")
CLAMPED = (
    "it first clamps values softly to ±15 (15 tanh(v/15)), which LASER does not; checked against ours on values "
    "clamped alike, and slower by that clamp"
)
GPT_FORM = ("softmax", "laser", "self_adjust")
GPT_NOTE = "LayerNorm, GELU and learned positions in the place of RMSNorm, SwiGLU and rotary ones"
_MASKED = "its caller hands it a mask of N x N, made once"


def family_of(spec: AttentionSpec) -> str:
    """The mechanism that a spec is listed under."""
    if isinstance(spec.weights, Performer) or not isinstance(spec.pattern, Full | Window):
        return "other"
    if isinstance(spec.pattern, Window):
        return "window"
    if isinstance(spec.weights, SelfAdjust):
        return "self_adjust"
    if isinstance(spec.read, Laser):
        return "laser"
    return "softmax" if spec.temperature is None else "temperatures"


def can_be_written_out(spec: AttentionSpec) -> bool:
    """Whether `sources/written_out.py` has the formula."""
    return family_of(spec) != "other"


def of_specs(specs: Sequence[str]) -> list[Competitor]:
    """Ours, and each of them written out."""
    found = []
    for text in dict.fromkeys(AttentionSpec.parse(spec).text for spec in specs):
        spec = AttentionSpec.parse(text)
        family = family_of(spec)
        # A window that a training example hardly leaves would be timed as full attention under another name.
        operations = ATTENTION if isinstance(spec.pattern, Window) else EVERYTHING
        if isinstance(spec.weights, Performer):  # decodes from sums, not from keys: another operation
            operations = tuple(name for name in operations if name != "decode")
        found.append(Competitor(text, "clearhead", family, text, operations, text))
        if can_be_written_out(spec):
            note = "computes all keys and hides those outside the window" if family == "window" else ""
            found.append(Competitor(f"{text} written out", "written-out", family, text, ATTENTION, text, note))
    return found


def in_gpt_form(specs: Sequence[str]) -> list[Competitor]:
    """Our decoder as a GPT, for those of `specs` that somebody else trains so."""
    texts = dict.fromkeys(AttentionSpec.parse(spec).text for spec in specs)
    return [  # each of these specs is the name of its family
        Competitor(f"{text}, GPT form", "clearhead", text, f"gpt {text}", ("step",), text, GPT_NOTE)
        for text in texts
        if text in GPT_FORM
    ]


def _rivals() -> list[Competitor]:
    found = [
        Competitor("torch sdpa", "torch", "softmax", "", ATTENTION, "softmax"),
        Competitor(
            "transformers sdpa", "transformers", "softmax", "sdpa", EVERYTHING, "softmax",
            "in the decode step with its dynamic cache, which copies all keys and values for each token",
        ),
        Competitor(
            "transformers sdpa, static cache", "transformers", "softmax", "sdpa static", ("decode",), "softmax",
            "a static cache of exactly the length that is needed, its best case",
        ),
        Competitor("transformers eager", "transformers", "softmax", "eager", EVERYTHING, "softmax", _MASKED),
    ]  # fmt: skip
    no_clamp = "its own decoder (RMSNorm, SwiGLU, rotary of its own kind): as many weights, another formula"
    for kind in ("flash", "no flash"):
        found.append(Competitor(f"x-transformers, {kind}", "x-transformers", "softmax", kind, ATTENTION, "softmax"))
        found.append(
            Competitor(
                f"x-transformers laser, {kind}", "x-transformers", "laser", f"laser {kind}", ATTENTION, "laser", CLAMPED
            )
        )
        for laser in ("", "laser "):
            found.append(
                Competitor(
                    f"x-transformers decoder, {laser}{kind}", "x-transformers", "laser" if laser else "softmax",
                    f"{laser}{kind}", ("step",), None, no_clamp,
                )
            )  # fmt: skip
    for option in ("sdpa", "softmax", "laser", "self_adjust"):
        spec = "softmax" if option == "sdpa" else option
        words = "sdpa" if option == "sdpa" else f"{option} written out"
        beside = f"{spec}, GPT form"
        found.append(Competitor(f"nanoGPT-style, {words}", "nanogpt", spec, option, ("step",), spec, GPT_NOTE, beside))
    for spec in COMPILED_SPECS:
        name = f"{spec} written out, compiled"
        operations = ("forward", "forward+backward")
        found.append(Competitor(name, "compiled", spec, spec, operations, spec, default=False))
    return found


COMPETITORS: tuple[Competitor, ...] = (*_rivals(), *of_specs(DEFAULT_SPECS), *in_gpt_form(DEFAULT_SPECS))
"""Everyone of the default bench, and those on request."""


def competitors(specs: Sequence[str], sources: Sequence[str]) -> list[Competitor]:
    """Those of `specs`, and rivals of the sources that are asked for, in the order of the tables; the baselines always.

    A rival with a mechanism that none of `specs` has is left out, softmax apart. What is not installed is among them:
    it is listed, not timed.
    """
    ours = [*of_specs(specs), *(in_gpt_form(specs) if "nanogpt" in sources else ())]
    if "softmax" not in {one.name for one in ours}:
        baseline = next(one for one in of_specs(["softmax"]) if one.source == "clearhead")
        ours.append(replace(baseline, operations=("step",)))
    families = {"softmax"} | {one.family for one in ours}
    chosen = [one for one in ours if one.source in ("clearhead", *sources)]
    chosen += [one for one in _rivals() if one.source in ("torch", *sources) and one.family in families]
    order = {name: place for place, name in enumerate(("torch", "clearhead", "written-out"))}
    return sorted(chosen, key=lambda one: (FAMILIES.index(one.family), order.get(one.source, len(order))))
