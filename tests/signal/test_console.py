"""What the terminal shows of MADE-UP reports."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from clearhead.signal import view, words
from clearhead.signal.console import as_text, print_report
from tests.signal.made_reports import CASES, advice, finding, poisoned, report


def code_lines(one) -> set[str]:
    return {line for a in one.advice for text in (a.line, a.command or "") for line in text.splitlines()}


def table_rows(text: str) -> dict[str, list[str]]:
    found = [line.split() for line in text.splitlines() if re.match(r"\s+(\d+|out)\s", line) and "." not in line[:8]]
    return {cells[0]: cells[1:] for cells in found}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("case", CASES)
def test_no_line_is_wider_than_the_terminal_and_no_cell_is_cut(case, width):
    one = CASES[case]()
    text = as_text(one, width)
    assert "\x1b" not in text
    assert "…" not in text
    for line in text.splitlines():
        assert len(line) <= width or line.strip() in code_lines(one), line
    for line in code_lines(one):
        assert line == "" or f"     {line}" in text  # to be copied, so never broken


@pytest.mark.parametrize("layers", [4, 24])
def test_a_shallow_model_is_shown_whole_with_its_own_numbers(layers):
    one = report(layers)
    text = as_text(one)
    rows = table_rows(text)
    assert list(rows) == [*map(str, range(layers)), "out"]
    assert "Every" not in text
    for layer in range(layers):
        taps = [trace[f"decoder.{layer}.attention.input"] for trace in (one.predicted, one.measured)]
        assert rows[str(layer)][:2] == [words.brief(tap.forward.variance) for tap in taps]
        assert rows[str(layer)][4:6] == [words.brief(tap.backward.variance) for tap in taps]


def test_a_deep_model_is_thinned_and_says_so():
    one = replace(report(192), findings=(finding(depth=101), finding("rank_collapse", "harmful", depth=50)))
    text = as_text(one)
    rows = table_rows(text)
    assert set(rows) == {*map(str, range(0, 192, 8)), "50", "101", "191", "out"}
    assert rows["101"][-1] == "!!"
    assert rows["50"][-1] == "!"
    assert rows["0"][-1] not in ("!", "!!")
    assert "Every 8th of 192 layers, the last, and those that a finding points at" in " ".join(text.split())


def test_what_is_absent_has_no_column():
    assert "score spread" not in as_text(CASES["no statistics"]())
    assert "gradient var." not in as_text(CASES["no gradients"]())
    alone = as_text(CASES["no measurement"]())
    assert "theory alone" in alone
    assert len(table_rows(alone)["3"]) == 5
    assert "weight gradient" not in as_text(report(), 80)
    assert "weight gradient" in as_text(report(), 120)


def test_what_is_not_finite_is_printed():
    rows = table_rows(as_text(poisoned()))
    assert rows["2"][1] == "inf"
    assert rows["3"][1] == "nan"
    assert rows["3"][3] == "nan"  # a correlation of nothing is not 0
    assert rows["1"][1] not in ("inf", "nan")


def test_findings_come_worst_first_with_evidence_and_advice_with_all_it_says():
    one = report()
    flat = " ".join(as_text(one).split())
    assert flat.index("!! untrainable") < flat.index("! harmful") < flat.index(". note")
    for part in (one.advice[0].title, one.advice[0].line, one.advice[0].reason, one.advice[0].command):
        assert part in flat
    assert "Cures: vanishing gradient, rank collapse." in flat
    assert "Leaves: rank collapse." in flat
    assert "largest stream variance 2.07 -> 1;" in flat
    assert "Findings None." in " ".join(as_text(report(broken=False)).split())


def test_markup_in_names_is_text():
    text = as_text(CASES["hostile names"]())
    for part in ("</script><b>&[red]x[/]", "<img src=x>[red]", "[bold]<b>&", "echo '<&>' [red]x[/red]"):
        assert part in text


def test_colour_only_repeats_what_words_say():
    stream = io.StringIO()
    print_report(report(), Console(file=stream, width=80, force_terminal=True, color_system="standard"))
    coloured = stream.getvalue()
    assert "\x1b[" in coloured
    bare = "\n".join(line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", coloured).splitlines())
    assert bare == as_text(report())


def test_a_report_prints_as_its_table():
    assert str(report()) == as_text(report())


def test_both_stacks_are_shown():
    text = as_text(CASES["two stacks"]())
    assert text.index("Encoder by layer") < text.index("Decoder by layer")
    assert "in the decoder, from layer 5 down" in " ".join(text.split())


def test_the_verdict_promises_one_line_only_where_one_cures_everything():
    one = report()
    assert words.verdict_sentence(one).endswith("; one line repairs it.")
    assert words.verdict_sentence(replace(one, advice=one.advice[1:])).endswith("; the advice repairs a part of it.")
    unrelated = advice(cures=("silent_branches",))
    assert words.verdict_sentence(replace(one, advice=(unrelated,))).endswith("(from layer 3 down).")
    assert words.verdict_sentence(replace(one, findings=(), advice=())) == "Not expected to train."
    assert words.verdict_sentence(report(broken=False)).startswith("Expected to train:")
    harmful = replace(one, verdict="trainable", findings=one.findings[:1])
    assert words.verdict_sentence(harmful).startswith("Expected to train, though not at its best: the tokens become")
    with pytest.raises(ValueError, match="expected trainable or untrainable, got 'fine'"):
        words.verdict_sentence(replace(one, verdict="fine"))


@given(st.floats(-1e300, 1e300) | st.sampled_from([math.nan, math.inf, -math.inf]))
def test_numbers_are_short_and_true(value):
    text = words.brief(value)
    assert len(text.removeprefix("-")) <= (7 if abs(value) == 0 or 1e-99 <= abs(value) < 1e99 else 8)
    for shown, digits in ((text, 0.05), (words.number(value).replace(",", ""), 0.005)):
        back = float(shown)
        assert (math.isnan(back) and math.isnan(value)) or back == value or abs(back - value) <= digits * abs(value)


def test_nearly_one_is_told_from_one():
    assert words.correlation(1.0) == "1"
    assert words.correlation(1 - 3.6e-5) == "1-4e-5"
    assert words.correlation(0.9731) == "0.973"
    assert words.correlation(math.nan) == "nan"
    assert [words.share(x) for x in (0.0, 0.004, 0.5, 0.976, 1.0, math.nan)] == [
        "0%",
        "0.4%",
        "50%",
        "98%",
        "100%",
        "nan",
    ]


def test_every_kth_layer():
    assert view.shown_layers(list(range(24)), []) == (list(range(24)), 1)
    assert view.shown_layers(list(range(25)), []) == (list(range(0, 25, 2)), 2)
    assert view.shown_layers([], [3]) == ([], 1)
    kept, step = view.shown_layers(list(range(1000)), [7, 4000])
    assert step == 42
    assert {0, 7, 42, 999} <= set(kept)
    assert 4000 not in kept
    assert view.thinned(1, 24, "x") == ""
    assert [view.thinned(k, 99, "x")[:12].split()[1] for k in (2, 3, 11, 21, 42)] == [
        "2nd",
        "3rd",
        "11th",
        "21st",
        "42nd",
    ]
