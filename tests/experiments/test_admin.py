"""experiments/admin: the fits tell the laws apart, the change is measured as it is stated, a diverged run counts."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
import torch
from experiments.admin import amplification as grow
from experiments.admin import report
from experiments.admin.chart import LEFT, RIGHT, WIDE, Chart, Line, draw
from experiments.admin.laws import fit
from experiments.admin.translation import ARMS, SETTING, chosen_rates, model_config

DEPTHS = (6, 12, 24, 50, 100, 200)


def test_each_law_is_known_again():
    log, linear = fit(DEPTHS, [1 + 2 * math.log(n) for n in DEPTHS]), fit(DEPTHS, [3 + 0.5 * n for n in DEPTHS])
    assert (log.better, linear.better) == ("log n", "n")
    assert log.log_slope == pytest.approx(2.0)
    assert linear.linear_slope == pytest.approx(0.5)
    assert fit(DEPTHS, [4.0 * n**0.5 for n in DEPTHS]).exponent == pytest.approx(0.5)
    with pytest.raises(ValueError, match="three depths"):
        fit(DEPTHS[:2], [1.0, 2.0])


def test_all_schemes_start_from_weights_of_one_variance():
    for scheme in grow.SCHEMES:
        blocks = grow.build(grow.Job(scheme, 6, 0)).blocks
        found = torch.stack([block.attention.value.weight.detach().var() for block in blocks]).mean()
        assert float(found) == pytest.approx(2 / (4 * grow.WIDTH), rel=0.05), scheme


def test_the_change_is_that_of_the_weights_and_leaves_them_alone():
    job = grow.Job("Admin, profiled", 6, 0)
    model, tokens_bt = grow.build(job), grow.tokens_of(job)
    before = [parameter.clone() for parameter in model.parameters()]
    assert grow.change(model, tokens_bt, torch.zeros_like) == 0.0
    assert grow.change(model, tokens_bt, lambda weight: 1e-3 * weight) > 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_the_predicted_change_holds_where_it_is_small():
    """Six sub-layers: without a free constant, within a quarter, over schemes that differ by a factor of five."""
    runs = [grow.measure_one(grow.Job(scheme, 6, 0)) for scheme in grow.SCHEMES]
    for run in runs:
        assert run["small"] == pytest.approx(run["change_predicted"], rel=0.25), run["scheme"]
    changes = [run["small"] for run in runs]
    assert max(changes) > 4 * min(changes)
    found = report.amplification(runs)
    assert len(report.amplification_table(found)) > len(grow.SCHEMES)


def test_the_two_post_norm_arms_differ_in_omega_alone():
    from clearhead.models.make import build_model

    names = ("Post-LN", "Post-LN with Admin")
    plain, admin = (dict(build_model(model_config(name, SETTING), 0).named_parameters()) for name in names)
    assert set(admin) - set(plain) == {name for name in admin if name.endswith("omega")}
    assert all(torch.equal(value, admin[name]) for name, value in plain.items())


def test_a_run_that_diverged_is_not_chosen_unless_all_did():
    runs = [
        {"arm": "Pre-LN", "lr": lr, "val": val, "status": status}
        for lr, val, status in ((1e-3, 5.0, "finished"), (3e-3, 4.0, "diverged"), (3e-4, None, "diverged"))
    ]
    assert chosen_rates(runs) == {"Pre-LN": 1e-3}
    assert chosen_rates(runs[2:]) == {"Pre-LN": 3e-4}
    assert set(ARMS) == {"Post-LN", "Post-LN with Admin", "Pre-LN"}


def test_a_chart_is_svg_and_stays_in_its_frame():
    line = Line("a < b", [1, 10, 100], [1.0, 2.0, math.nan], 0, dots=True)
    svg = draw([Chart("title", "n", "y", [line], log_across=True), Chart("other", "n", "y", [line], limits=(0, 1))])
    root = ElementTree.fromstring(svg)
    assert "a < b" in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "nan" not in svg


def test_a_label_at_the_right_end_lies_within_the_picture():
    wide, narrow = Line("a", [0, 3000], [0.0, 1.0], 0), Line("b", [0, 4], [0.0, 1.0], 0)

    def width(*lines, columns=2):
        svg = draw([Chart("title", "n", "y", [line]) for line in lines], columns=columns)
        return int(ElementTree.fromstring(svg).get("width"))

    assert width(wide, columns=1) >= LEFT + WIDE + 14  # half of "3000" in digits of 7, at the end of the axis
    assert width(narrow, columns=1) == width(narrow, narrow) // 2 == LEFT + WIDE + RIGHT
    assert width(wide, narrow) == width(narrow, narrow)  # the next chart's margin has room for it
    assert width(narrow, wide) > width(narrow, narrow)
