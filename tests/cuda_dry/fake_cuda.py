"""A GPU that holds no data: code that runs on CUDA tensors, run where there is none.

`with FakeCuda():` makes tensors on `cuda` exist with shapes, dtypes and devices and without values
(FakeTensor), while tensors on the CPU stay real. What would go wrong on a GPU then fails by name:

    a value is read by the host        DataDependentOutputException
    a size depends on values           DynamicOutputShapeException
    a tensor was left on the CPU       FakeTensorDeviceMismatchError
    a product of two dtypes            MixedDtypes (fake tensors would let it pass)
    a copy that waits for the device   BlockingCopy (made by gdrt_ds, not from page-locked memory)

Nothing is computed, so no number is tested, and no kernel, stream or transfer either. Gradients cannot be
taken: autograd asks for streams that are not there. That is done on the meta device.

torch needs a device guard for CUDA, which builds without CUDA do not have. torch's own guard that does
nothing is registered by a C++ extension of two lines.
"""

from __future__ import annotations

import functools

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.host_reads import caller

CUDA = torch.device("cuda", 0)
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""
PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_attention_math",
}
"""Operators whose kernels want one dtype; the shape functions of fake tensors do not ask."""


class MixedDtypes(RuntimeError):
    """A product of tensors of different dtypes."""


class BlockingCopy(RuntimeError):
    """A copy to the device after which the host waits."""


@functools.cache
def register_guard() -> None:
    """Registers torch's guard that does nothing for CUDA, once per process; builds it at the first use."""
    from torch.utils.cpp_extension import load_inline

    # The first backward of a process starts a thread for every device that has a guard, and with such a
    # thread torch refuses a backward after a fork. So the first one comes before there is the guard.
    torch.ones(1, requires_grad=True).sum().backward()
    load_inline("gdrt_cuda_guard", GUARD, is_python_module=False, no_implicit_headers=True)


class FakeCuda:
    """The context in which `cuda` exists. See the head of this file for what fails in it.

    Copies are watched from `watch_copies` on: what a run moves once at its start may wait.
    """

    def __enter__(self) -> FakeCuda:
        register_guard()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.lifts_cpu_only = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor(..., device="cuda") starts a driver
        self.starts_driver = torch.cuda._lazy_init
        torch.cuda._lazy_init = lambda: None  # what torch calls before the first tensor on CUDA
        self.modes = (_Operators(self.fake), _Copies())
        for mode in self.modes:
            mode.__enter__()
        return self

    def watch_copies(self) -> None:
        self.modes[1].refuse = True

    def __exit__(self, *error) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)
        torch.cuda._lazy_init = self.starts_driver
        torch._C._set_only_lift_cpu_tensors(self.lifts_cpu_only)


def _on_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Operators(TorchDispatchMode):
    """Sends what touches the device to fake tensors, and lets the CPU work as ever."""

    supports_higher_order_operators = True  # FlexAttention is one

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if operator.name() in PRODUCTS:
            dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
            if len(dtypes) > 1:
                names = " and ".join(sorted(map(str, dtypes)))
                raise MixedDtypes(f"{operator.name()} of {names}")
        named = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if named or any(isinstance(tensor, FakeTensor) for tensor in tensors):
            args, kwargs = tree_map(self.as_fake, (args, kwargs))
            with self.fake:
                return operator(*args, **kwargs)
        return operator(*args, **kwargs)

    def as_fake(self, leaf):
        """A tensor of the CPU as a fake one that stays on the CPU, which an operator then finds there."""
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor):
            return self.fake.from_tensor(leaf)
        return leaf


class _Copies(TorchFunctionMode):
    """Page-locks nothing, but remembers what should be, and refuses copies from anywhere else."""

    def __init__(self):
        super().__init__()
        self.refuse = False
        self.locked: list[torch.Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "pin_memory":
            self.locked.append(args[0].view_as(args[0]))
            return self.locked[-1]
        if name in ("to", "cuda") and self.refuse:
            self.check(args[0], args[1:], kwargs)
        return function(*args, **kwargs)

    def check(self, tensor, places, kwargs) -> None:
        target = kwargs.get("device", places[0] if places else "cuda")
        if isinstance(target, torch.Tensor):
            target = target.device
        if not isinstance(target, (str, torch.device)) or not _on_cuda(target) or not tensor.is_cpu:
            return
        is_locked = any(tensor is locked for locked in self.locked)
        owner = caller()
        if owner is not None and not (is_locked and kwargs.get("non_blocking")):
            raise BlockingCopy(f"{owner} copies {tuple(tensor.shape)} to the device and waits")
