"""`explain` tells what `attend` does: who serves, who could, who refuses and why."""

from __future__ import annotations

import pytest
import torch

from clearhead.attention.attend import attend
from clearhead.attention.backends import BACKENDS
from clearhead.attention.bias import ALiBi, DenseBias
from clearhead.attention.explain import explain
from clearhead.attention.mask import Mask
from clearhead.errors import UserError
from clearhead.memory.cache import KVCache
from tests.contract_cases import SPECS

LIKE = tuple(torch.randn(1, 2, 16, 8) for _ in range(3))


def said(spec: str, **arguments: object) -> dict[str, tuple[str, str]]:
    return {v.backend: (v.verdict, v.reason) for v in explain(spec, LIKE, **arguments).verdicts}


def test_every_backend_is_named_once_and_one_serves() -> None:
    for spec in SPECS:
        result = explain(spec, LIKE, mask=Mask.causal())
        assert [v.backend for v in result.verdicts] == list(BACKENDS)
        assert [v.verdict for v in result.verdicts].count("chosen") == 1
        assert all(v.reason for v in result.verdicts)
        chosen = [v.backend for v in result.verdicts if v.verdict == "chosen"]
        assert [result.chosen] == chosen
        before = [v.verdict for v in result.verdicts[: list(BACKENDS).index(result.chosen)]]
        assert set(before) <= {"refused"}
        text = str(result)
        assert text.startswith(f"attention {spec}\n")
        assert all(name in text for name in BACKENDS)


def test_the_reasons() -> None:
    assert said("softmax")["sdpa"] == ("chosen", "PyTorch's fused kernel, no mask needed")
    assert "its own causal flag" in said("softmax", mask=Mask.causal())["sdpa"][1]
    assert "a 16 x 16 mask" in said("softmax", mask=Mask.key_lengths(torch.tensor([9])))["sdpa"][1]
    assert said("self_adjust")["sdpa"][0] == "refused"
    assert "after the softmax" in said("self_adjust")["sdpa"][1]
    assert "all 16 keys of a window of 4" in said("softmax+window:4", mask=Mask.causal())["sdpa"][1]
    trained = ALiBi(torch.rand(2, requires_grad=True))
    assert "slow path" in said("softmax", bias=trained)["sdpa"][1]
    assert said("softmax", bias=trained)["chunked"][0] == "chosen"
    assert "with the bias in it" in said("softmax", bias=ALiBi(torch.rand(2)))["sdpa"][1]
    assert "slow path" in said("softmax", dropout_p=0.1)["sdpa"][1]
    assert "float64" in said("laser")["sdpa"][1]
    long = torch.empty(1, 1, 5000, 1)
    far = explain("softmax", (long, long, long), mask=Mask.key_lengths(torch.tensor([9])))
    assert "write out a 5000 x 5000 mask" in far.verdicts[0].reason


def test_explain_says_what_attend_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen backend is the one that runs, for every spec; a named one that refuses raises with its reason."""
    for spec in SPECS:
        if spec.temperature is not None:
            continue
        ran: list[str] = []
        for name, backend in BACKENDS.items():
            spied = lambda call, name=name, run=backend.run, ran=ran: (ran.append(name), run(call))[1]
            monkeypatch.setitem(BACKENDS, name, type(backend)(name, backend.refuse, backend.note, spied))
        attend(*LIKE, spec, mask=Mask.causal())
        assert ran == [explain(spec, LIKE, mask=Mask.causal()).chosen]
        monkeypatch.undo()
    with pytest.raises(ValueError, match=r"backend 'sdpa' refuses attention 'self_adjust': .* use backend='auto'"):
        attend(*LIKE, "self_adjust", backend="sdpa")
    with pytest.raises(UserError, match=r"unknown backend 'chunkd' \(did you mean 'chunked'\?\)"):
        attend(*LIKE, backend="chunkd")


def test_temperatures_need_not_be_given_and_errors_are_attends_own() -> None:
    assert explain("laser+selective", LIKE).chosen == "sdpa"
    with pytest.raises(ValueError, match="laser refuses attention dropout"):
        explain("laser", LIKE, dropout_p=0.1)
    with pytest.raises(ValueError, match="does not broadcast"):
        explain("softmax", LIKE, bias=DenseBias(torch.zeros(1, 3, 16, 16)))


def test_a_refused_call_leaves_the_cache_alone() -> None:
    """A caller may catch the refusal and try another backend; `explain` with a cache only looks."""
    cache = KVCache.allocate(1, 2, 32, 8)
    with pytest.raises(ValueError, match="refuses"):
        attend(*LIKE, "self_adjust", mask=Mask.causal(), state=cache, backend="sdpa")
    assert cache.lengths.tolist() == [0]
    explain("softmax", LIKE, mask=Mask.causal(), state=cache)
    assert cache.lengths.tolist() == [0]
