"""Counts what makes the host wait for a device: every value of a tensor that Python reads.

On a CPU nothing waits, so the same calls are counted there by name. `HostReads` sees them at two levels:
what Python calls on a tensor (`item`, `tolist`, `bool(...)`, a copy to the CPU), and the operators below it
whose result has a size that depends on values (`nonzero`, a boolean index). Each is put down to the
innermost function of the package that made the call; calls that DeepSpeed or transformers make for
themselves are not ours and are left out.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__array__",
    "is_nonzero",
    "equal",
    "allclose",
}
"""Methods of a tensor after which Python knows a value."""
SIZED_BY_VALUES = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_consecutive"}
"""Operators that wait, because the size of their result depends on values."""
ROOT = str(Path(__file__).resolve().parents[1])


def caller() -> str | None:
    """`file:function` of the innermost frame of gdrt_ds; None where another package made the call."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(f"{ROOT}/gdrt_ds/"):
            return f"{Path(name).name}:{frame.f_code.co_name}"
        if any(part in name for part in ("/deepspeed/", "/transformers/", "/peft/", "/bitsandbytes/")):
            return None
        frame = frame.f_back
    return None


class HostReads:
    """`with HostReads() as reads: ...`; then `reads.counts` is {`file:function:what`: times}."""

    def __init__(self):
        self.counts: Counter[str] = Counter()

    def note(self, what: str) -> None:
        owner = caller()
        if owner is not None:
            self.counts[f"{owner}:{what}"] += 1

    def __enter__(self) -> HostReads:
        self.modes = (_Calls(self), _Operators(self))
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)


class _Calls(TorchFunctionMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in READS:
            self.reads.note(name)
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name
        if name in SIZED_BY_VALUES:
            self.reads.note(name)
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            if masks:
                self.reads.note("boolean index")
        return operator(*args, **(kwargs or {}))
