from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from clearhead.errors import UserError
from clearhead.models.choices import CHOICES
from clearhead.models.config import PRESETS, ModelConfig


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = PRESETS[name]
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_derived_sizes_follow_replaced_fields():
    config = ModelConfig(width=128, heads=4)
    assert (config.key_value_heads, config.head_size, config.hidden_size) == (4, 32, 344)
    wider = dataclasses.replace(config, heads=8, feed_forward="gelu")
    assert (wider.key_value_heads, wider.head_size, wider.hidden_size) == (8, 16, 512)
    stated = dataclasses.replace(config, kv_heads=2, head_dim=10, hidden=7)
    assert (stated.key_value_heads, stated.head_size, stated.hidden_size) == (2, 10, 7)


def test_swiglu_has_about_as_many_weights_as_gelu():
    for width in (64, 128, 256, 768):
        swiglu = ModelConfig(width=width).hidden_size
        assert swiglu % 8 == 0
        assert 3 * swiglu * width == pytest.approx(2 * 4 * width * width, rel=0.04)


def test_attention_and_targets_are_kept_in_canonical_form():
    config = ModelConfig(attention="selective+laser", temperature_on="value+query")
    assert config.attention == "laser+selective"
    assert config.temperature_on == "query+value"
    assert config == ModelConfig(attention="laser+selective")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"atention": "laser"}, "did you mean 'attention'?"),
        ({"position": "rotary", "norm": "rms"}, "unknown position 'rotary'"),
        ({"norm": "rmss"}, "did you mean 'rms'?"),
        ({"attention": "lasr"}, "did you mean 'laser'?"),
        ({"attention": "laser+self_adjust"}, "sum to 1"),
        ({"temperature_on": "query+values"}, "did you mean 'value'?"),
        ({"temperature_on": "query+query"}, "at most once"),
        ({"layers": 0}, "layers: expected a whole number of at least 1, got 0"),
        ({"width": 128.0}, "width: expected a whole number"),
        ({"width": True}, "width: expected a whole number"),
        ({"heads": 3}, "width: expected a multiple of heads=3, got 128"),
        ({"kv_heads": 3}, "kv_heads: expected a divisor of heads=4, got 3"),
        ({"head_dim": 7}, "head_dim: rope turns pairs"),
        ({"width": 15, "heads": 5, "position": "sinusoidal"}, "expected an even width, got 15"),
        ({"dropout": 1.0}, "dropout: expected a share in [0, 1), got 1.0"),
        ({"rope_base": float("nan")}, "rope_base: expected a finite number"),
        ({"temperature_lr_scale": 0}, "temperature_lr_scale: expected a number above 0"),
        ({"qk_norm": 1}, "qk_norm: expected true or false, got 1"),
        ({"attention": "laser", "attention_dropout": 0.1}, "set attention_dropout=0"),
        ({"attention": 3}, "attention"),
        ({"position": "xl", "architecture": "feedback"}, "places each memory on its own"),
        ({"position": "xl", "attention": "performer"}, "it adds to scores"),
        ({"memory": "full:8", "attention": "performer"}, "carries the whole past"),
        ({"position": "kerple", "kerple_form": "gauss"}, "kerple_form"),
        ({"position": "fire", "attention": "performer"}, "it adds to scores"),
        ({"position": "fire", "fire_threshold": -1.0}, "a length above 0, got -1.0"),
        ({"position": "rope", "fire_threshold": 8.0}, "only position=fire has a threshold, not rope"),
        ({"position": "fire", "fire_hidden": 0}, "fire_hidden: expected a whole number of at least 1"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message):
    with pytest.raises(UserError) as caught:
        ModelConfig.from_dict(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_choice_is_a_field_and_every_default_is_a_choice():
    defaults = ModelConfig().to_dict()
    for name, choices in CHOICES.items():
        assert defaults[name] in choices


def test_imports_without_torch():
    code = "import sys, clearhead.models.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
