"""The grammar of attention specs: print and parse, nearest names, refused products."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clearhead.attention.spec import (
    INVALID_PRODUCTS,
    KINDS,
    REGISTRY,
    AttentionSpec,
    Choice,
    Full,
    Laser,
    Learned,
    Mean,
    Selective,
    SelfAdjust,
    Softmax,
    Weights,
    Window,
    register,
)
from clearhead.errors import UserError
from tests.contract_cases import REFUSED_PRODUCTS, SPECS


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_print_and_parse(spec: AttentionSpec) -> None:
    assert AttentionSpec.parse(str(spec)) == spec
    assert set(str(spec)) <= set("abcdefghijklmnopqrstuvwxyz_0123456789:=,+"), "safe in a shell, without quotes"


weights = st.one_of(st.just(Softmax()), st.builds(SelfAdjust, st.sampled_from(SelfAdjust.FORMS), st.booleans()))
patterns = st.one_of(st.just(Full()), st.builds(Window, st.integers(1, 10**9)))
temperatures = st.sampled_from([None, Selective(), Learned()])


@settings(derandomize=True, deadline=None)
@given(weights, st.sampled_from([Mean(), Laser()]), patterns, temperatures, st.randoms(use_true_random=False))
def test_terms_in_any_order(w: Weights, read: Choice, pattern: Choice, temperature: Choice | None, random) -> None:  # type: ignore[no-untyped-def]
    if read == Laser() and w != Softmax():
        with pytest.raises(UserError, match="weights that sum to 1"):
            AttentionSpec(w, read, pattern, temperature)  # type: ignore[arg-type]
        return
    spec = AttentionSpec(w, read, pattern, temperature)  # type: ignore[arg-type]
    terms = [str(c) for c in (w, read, pattern, temperature) if c is not None]
    random.shuffle(terms)
    assert AttentionSpec.parse("+".join(terms)) == AttentionSpec.parse(str(spec)) == spec
    assert hash(AttentionSpec.parse(str(spec))) == hash(spec)


@settings(derandomize=True, deadline=None)
@given(st.text(alphabet="softmaxlerwind_:=,+0129 ", max_size=25))
def test_any_text_parses_or_says_why(text: str) -> None:
    try:
        spec = AttentionSpec.parse(text)
    except UserError as caught:
        error = str(caught)
    else:
        assert AttentionSpec.parse(str(spec)) == spec
        return
    assert "\n" not in error
    assert text in error or ":" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lazer", "unknown term 'lazer' (did you mean 'laser'?)"),
        ("softmax+selectiv", "did you mean 'selective'?"),
        ("self_adjust:form=rang", "unknown form 'rang' (did you mean 'range'?)"),
        ("self_adjust:froms=range", "no option 'froms' (did you mean 'form'?)"),
        ("self_adjust:detach_extrema=yes", "expected true or false, got 'yes'"),
        ("self_adjust:form=range,form=minmax", "got form twice"),
        ("window", "expected a size of at least 1"),
        ("window:0", "expected a size of at least 1, got 0"),
        ("window:2.5", "expected a whole number, got '2.5'"),
        ("window:many", "expected a whole number, got 'many'"),
        ("laser:2", "laser takes no value, got '2'"),
        ("softmax+laser+mean", "two values for read, laser and mean"),
        ("window:3+window:4", "two values for pattern"),
        ("", "an empty term"),
        ("softmax++laser", "an empty term"),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        AttentionSpec.parse(text)
    assert said in str(caught.value)


@pytest.mark.parametrize("not_text", [None, 3, ["laser"]])
def test_only_text_parses(not_text: object) -> None:
    with pytest.raises(TypeError, match="expected a string such as"):
        AttentionSpec.parse(not_text)  # type: ignore[arg-type]


def test_refused_products_quote_the_reason() -> None:
    """Self-Adjust x LASER: the row sum is not 1, in every form, pattern and temperature. Performer: any pattern, a
    learned temperature, and LASER on the kernel with signs. Nothing else."""
    ours = {text: error for text, error in REFUSED_PRODUCTS.items() if "self_adjust" in text}
    assert len(ours) == 8 * 3 * 3
    for text, error in ours.items():
        assert "laser" in text
        assert "rows of self_adjust do not" in error
    sums = {text: error for text, error in REFUSED_PRODUCTS.items() if text not in ours}
    # Of 2 reads x 3 patterns x 3 temperatures a positive kernel keeps 2 x 2, the other one 2.
    assert len(sums) == 3 * 2 * 3 * 3 - 2 * 4 - 2
    for text in sums:
        assert "performer" in text
        assert any(word in text for word in ("window", "bigbird", "learned", "trigonometric,features=16+laser"))
    said = " ".join(REFUSED_PRODUCTS.values())
    assert all(rule.reason.split("{weights}")[0] in said for rule in INVALID_PRODUCTS)


def test_values_are_frozen_hashable_and_pickle() -> None:
    spec = AttentionSpec.parse("laser+window:7+selective")
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.read = Mean()  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.pattern.size = 8  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert len({spec, AttentionSpec.parse("selective+laser+window:7"), AttentionSpec()}) == 2
    assert AttentionSpec.parse(spec) is spec
    assert str(AttentionSpec()) == "softmax"
    assert str(AttentionSpec(read=Laser())) == "laser"


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="'laser' is registered already, by Laser"):
        register("laser")(Softmax)
    assert Softmax.name == "softmax"
    assert {cls.kind for cls in REGISTRY.values()} == set(KINDS)


def test_no_torch() -> None:
    """The command line reads specs before any tensor exists."""
    code = "import sys; from clearhead.attention.spec import AttentionSpec as A; A.parse('laser'); print('torch' in "
    code += "sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
