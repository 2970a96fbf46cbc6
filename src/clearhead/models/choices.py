"""The names that a model's config may choose from. Imports no torch."""

from __future__ import annotations

from clearhead.init.deepscale import CONSTANTS, DEPTH_COUNTS

ARCHITECTURES = ("decoder", "encoder", "seq2seq", "feedback")
FEED_FORWARDS = ("swiglu", "gelu", "relu")
NORMS = ("layer", "rms")
NORM_PLACEMENTS = ("pre", "post")
POSITIONS = ("none", "learned", "sinusoidal", "rope", "alibi", "t5", "kerple", "fire", "xl", "relative_key")
KERPLE_FORMS = ("log", "power")
FEEDBACK_STARTS = ("nothing", "zeros")
OUTPUT_GATES = ("none", "fixed", "head", "element")
INITS = ("standard", "xavier", "small", "deepscale", "deepscale_simple", "admin", "admin_constant")
DEEPSCALE = ("deepscale", "deepscale_simple")
ADMIN = ("admin", "admin_constant")
DEEPSCALE_KEYS = ("context", "many")
ADMIN_OMEGAS = ("profiled", "predicted")
OUTPUT_CHANGES = ("log", "constant", "linear")
OMEGA_FORMS = ("buffer", "vector")
TEMPERATURE_GRANULARITIES = ("shared", "head_slice", "head_full")
TEMPERATURE_TARGETS = ("query", "key", "value")
TEMPERATURE_PARTS = ("token+position", "token", "position")
TEMPERATURE_SLOPES = ("sigmoid", "linear")

CHOICES: dict[str, tuple[str, ...]] = {
    "architecture": ARCHITECTURES,
    "feed_forward": FEED_FORWARDS,
    "norm": NORMS,
    "norm_placement": NORM_PLACEMENTS,
    "position": POSITIONS,
    "kerple_form": KERPLE_FORMS,
    "output_gate": OUTPUT_GATES,
    "feedback_start": FEEDBACK_STARTS,
    "init": INITS,
    "depth_counts": DEPTH_COUNTS,
    "deepscale_constants": CONSTANTS,
    "deepscale_keys": DEEPSCALE_KEYS,
    "admin_omega": ADMIN_OMEGAS,
    "output_change": OUTPUT_CHANGES,
    "omega_form": OMEGA_FORMS,
    "temperature_granularity": TEMPERATURE_GRANULARITIES,
    "temperature_parts": TEMPERATURE_PARTS,
    "temperature_slope": TEMPERATURE_SLOPES,
}
