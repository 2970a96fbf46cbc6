from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from clearhead.data.config import DataConfig
from clearhead.errors import UserError
from clearhead.models.config import ModelConfig
from clearhead.train.config import OptimConfig, RunConfig, TrainConfig


def test_json_brings_back_an_equal_hashable_config(config):
    first = config(optim={"betas": (0.8, 0.99), "schedule": "wsd"}, precision="bf16")
    again = RunConfig.from_dict(json.loads(json.dumps(first.to_dict())))
    assert again == first
    assert hash(again) == hash(first)


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [("train", "batchsize", "batch_size"), ("optim", "warmup", "warmup_steps"), ("model", "with", "width")],
)
def test_misspelt_key_names_the_nearest(config, section, key, meant):
    values = config().to_dict()
    values[section][key] = 1
    with pytest.raises(UserError, match=f"(?s){key}.*did you mean '{meant}'"):
        RunConfig.from_dict(values)


def test_misspelt_section(config):
    values = config().to_dict()
    values["optimizer"] = values.pop("optim")
    with pytest.raises(UserError, match="did you mean 'optim'"):
        RunConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "exactly one of steps and tokens, got neither"),
        ({"steps": 5, "tokens": 9}, "both"),
        ({"steps": 0}, "train.steps: expected a whole number of at least 1, got 0"),
        ({"steps": True}, "got True"),
        ({"steps": 5, "batch_size": 6, "grad_accum": 4}, "a multiple of grad_accum=4"),
        ({"steps": 5, "precision": "fp16"}, "unknown train.precision 'fp16'"),
        ({"steps": 5, "parallel": "fsdp2"}, "did you mean 'fsdp'"),
        ({"steps": 5, "compile": "yes"}, "true or false"),
    ],
)
def test_train_config_says_what_is_wrong(values, said):
    with pytest.raises(UserError, match=said):
        TrainConfig(**values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lr": 0}, "optim.lr: expected a number above 0, got 0"),
        ({"lr": float("nan")}, "finite"),
        ({"min_lr_fraction": 1.5}, "at most 1"),
        ({"betas": (0.9,)}, "two numbers"),
        ({"betas": (0.9, 1.0)}, "below 1"),
        ({"clip_norm": -1.0}, "above 0"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_optim_config_says_what_is_wrong(values, said):
    with pytest.raises(UserError, match=said):
        OptimConfig(**values)


def test_parts_must_agree(config):
    train = TrainConfig(steps=100)
    with pytest.raises(UserError, match=r"model.context=256 and data.context=128"):
        RunConfig(train=train, data=DataConfig(context=128))
    with pytest.raises(UserError, match=r"set model.vocab_size=4096"):
        RunConfig(train=train, data=DataConfig(tokenizer="bpe"))
    with pytest.raises(UserError, match=r"warmup_steps=100: expected fewer than the 100 steps"):
        RunConfig(train=train, optim=OptimConfig(warmup_steps=100))
    RunConfig(train=train, data=DataConfig(tokenizer="bpe"), model=ModelConfig(vocab_size=4096))


def test_budget_in_tokens_is_rounded_up_to_steps(config):
    run = dataclasses.replace(config(), train=TrainConfig(tokens=1281, batch_size=4))
    assert run.tokens_per_step == 4 * 32
    assert run.total_steps == 11


def test_config_imports_no_torch():
    code = "import sys, clearhead.train.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
