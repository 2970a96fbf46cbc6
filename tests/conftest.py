"""Fixtures of all tests. Needs only torch, numpy and pytest: the contract suite also runs on bare GPU machines."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from clearhead.kernels import rule

pytest.register_assert_rewrite("tests.contract_tools", "tests.contract_practice")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the contract suite runs: cpu (default), cuda, cuda:1, ...")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # as many workers as cores, one thread each
    with torch.device("cpu"):  # torch remembers its constructors when it first meets a device context: the true ones,
        torch.empty(0)  # not those that `poison` puts in their place for the length of a test
    wanted = torch.device(config.getoption("--device"))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {wanted}: PyTorch sees no GPU here")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`make`, but memory that clearhead's own code asks for holds NaN (integers: their largest value)."""

    def made(*args: object, **keywords: object) -> torch.Tensor:
        tensor = make(*args, **keywords)
        if torch.compiler.is_compiling():
            return tensor
        if sys._getframe(1).f_globals.get("__name__", "").startswith("clearhead"):
            with torch.no_grad():
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
                elif tensor.dtype != torch.bool:
                    tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return made


@contextmanager
def poison() -> Iterator[None]:
    """Uninitialised memory of clearhead is NaN, so that reading it fails a test instead of hiding in it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
            patch.setattr(torch, name, _poison(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, _poison(getattr(torch.Tensor, name)))
        # A buffer that outlives its call would bring numbers along: inside, every call makes its own.
        patch.setattr(rule, "_BETWEEN_CALLS", threading.local())
        patch.setattr(rule.Scratch, "KEPT", -1)
        yield


@pytest.fixture
def poisoned() -> Iterator[None]:
    """A whole test inside `poison`."""
    with poison():
        yield
