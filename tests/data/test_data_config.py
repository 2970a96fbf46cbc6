import ast
import dataclasses
import inspect
from itertools import pairwise

import pytest

from clearhead.data.config import DataConfig
from clearhead.errors import UserError


def test_plain_values_give_the_same_config_back():
    config = DataConfig(source="my.txt", tokenizer="bpe", vocab_size=512, context=32, max_bytes=10_000)
    assert DataConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"contxt": 3}, "unknown key in data 'contxt' .did you mean 'context'"),
        ({"tokenizer": "byte"}, "unknown tokenizer 'byte' .did you mean 'bytes'"),
        ({"source": " "}, "data.source is empty"),
        ({"context": 0}, "data.context must be at least 1, got 0"),
        ({"context": "256"}, "data.context must be int, got '256'"),
        ({"context": True}, "data.context must be int, got True"),
        ({"context": 2.5}, "data.context must be int, got 2.5"),
        ({"source": 3}, "data.source must be str"),
        ({"val_fraction": 0}, "data.val_fraction must lie between 0 and 1, got 0"),
        ({"test_fraction": 1.0}, "data.test_fraction must lie between 0 and 1"),
        ({"test_fraction": 0.5, "val_fraction": 0.5}, "must stay below 0.9, got 1"),
        ({"split_seed": -1}, "data.split_seed must not be negative"),
        ({"max_bytes": 0}, "data.max_bytes must be positive"),
        ({"tokenizer": "bpe", "vocab_size": 257}, "data.vocab_size must be at least 258"),
    ],
)
def test_wrong_values_name_the_key_and_the_mistake(values, message):
    with pytest.raises(UserError, match=message):
        DataConfig.from_dict(values)


def test_every_field_is_explained():
    # The texts under the fields are the command line's help; a field without one would show none.
    body = ast.parse(inspect.getsource(DataConfig)).body[0].body
    explained = {
        a.target.id
        for a, b in pairwise(body)
        if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant)
    }
    assert explained == {field.name for field in dataclasses.fields(DataConfig)}
