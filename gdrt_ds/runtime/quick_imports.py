"""Imports of libraries that compile functions while they are imported, without the compiler: a second less
of every start.

bitsandbytes and DeepSpeed put `torch.compile` on functions of their modules. That alone imports torch's
compiler, which takes a second, whether or not anybody calls those functions. Here they are compiled when they
are first called.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch


@contextlib.contextmanager
def compiled_when_called() -> Iterator[None]:
    """Inside, `torch.compile` of a plain function waits for the function's first call."""
    compile_now = torch.compile

    def later(function: Any = None, **settings: Any) -> Any:
        if function is None:
            return functools.partial(later, **settings)
        if not isinstance(function, FunctionType):  # a module keeps its type
            return compile_now(function, **settings)
        compiled: Callable[..., Any] | None = None

        @functools.wraps(function)
        def call(*args: Any, **words: Any) -> Any:
            nonlocal compiled
            if compiled is None:
                compiled = compile_now(function, **settings)
            return compiled(*args, **words)

        return call

    torch.compile = later
    try:
        yield
    finally:
        torch.compile = compile_now


def import_bitsandbytes() -> None:
    """Imports bitsandbytes, if it is there, before PEFT does."""
    with compiled_when_called(), contextlib.suppress(ImportError):
        import bitsandbytes  # noqa: F401


def import_muon() -> None:
    """Imports DeepSpeed's Muon, if this version has it, before `deepspeed.initialize` asks for it."""
    with compiled_when_called(), contextlib.suppress(ImportError):
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
