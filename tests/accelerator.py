"""A pretend accelerator for tests: PyTorch's device ``pretend``, computed on the CPU, as strict as a real one.

Its tensors are seen by every operation as lying on another device. An operation that mixes them with tensors of the CPU
raises as CUDA would; allowed is what CUDA allows: numbers (tensors without dimensions), copies, and indices on the CPU. Each
operation is computed by the CPU, so results are the CPU's; fused kernels alone are taken apart, and may round otherwise.

Registered by `register`; also as a package's entry point ``torch.backends``, which PyTorch looks for in every process.

Leaves out: streams, memory, generators, autocast.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

NAME = "pretend"
ATEN = torch.ops.aten
COPIES = {ATEN.copy_.default, ATEN._to_copy.default, ATEN._copy_from.default, ATEN._copy_from_and_resize.default}
INDEXED = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._index_put_impl_.default}
NARROW: list[bool] = []
"""Not empty: the device knows no numbers of 64 bits, as MPS."""


class Pretend(torch.Tensor):
    """A tensor on the device; ``raw`` holds its numbers."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Pretend:
        if raw.dtype == torch.float64 and NARROW:
            raise TypeError(f"{NAME} knows no float64")
        at = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype, "layout": raw.layout}
        with torch.inference_mode(False):  # a view of a weight must count its changes with it
            return torch.Tensor._make_wrapper_subclass(cls, raw.shape, **at, device=torch.device(NAME, 0))

    def __init__(self, raw: torch.Tensor):
        self.raw = raw

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretend({self.raw})"

    def tolist(self) -> Any:
        return self.raw.tolist()  # PyTorch's own refuses subclasses

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return perform(func, args, kwargs or {})


def perform(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the device, by the CPU's."""
    if (made := func.decompose(*args, **kwargs)) is not NotImplemented:  # without gradients even composed operations come here
        return made
    check(func, args, kwargs)
    if func is ATEN._conj.default:  # a view with a mark that the operations below would not see
        return Pretend(torch.conj_physical(args[0].raw))
    device = kwargs.get("device")
    leaves = func in COPIES and func is ATEN._to_copy.default and device is not None and torch.device(device).type != NAME
    plain_args, plain = pytree.tree_map(_raw, (args, kwargs))
    if device is not None and not leaves:
        plain["device"] = torch.device("cpu")
    out = func(*plain_args, **plain)
    if leaves or (func is ATEN.copy_.default and not isinstance(args[0], Pretend)):
        return args[0] if func is ATEN.copy_.default else out
    made = pytree.tree_map(lambda x: Pretend(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, made)


def check(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raises RuntimeError where a CPU tensor with dimensions meets one of the device."""
    if func in COPIES:
        return
    looked = args[:1] + args[2:] if func in INDEXED else args
    for each in pytree.tree_leaves((looked, kwargs)):
        if isinstance(each, torch.Tensor) and not isinstance(each, Pretend) and each.dim():
            raise RuntimeError(f"{func}: expected all tensors to be on one device, but found {NAME} and {each.device}")


def _raw(x: Any) -> Any:
    return x.raw if isinstance(x, Pretend) else x


class Backend:
    """What ``torch.pretend`` is."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_device_name(device: Any = None) -> str:
        return "Pretend 1"

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None: ...

    @staticmethod
    def empty_cache() -> None: ...

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]


@cache
def register() -> str:
    """Makes the device known to PyTorch; returns its name."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, Backend())
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(lambda func, *args, **kwargs: perform(func, args, kwargs), "PrivateUse1")
    aten.impl("_copy_from", _copied, "PrivateUse1")
    for each in ("arange", "arange.start", "arange.start_step"):  # PyTorch's own would resize a tensor that is there
        aten.impl(each, _arange, "PrivateUse1")
    LIBRARIES.extend((every, aten))
    torch.__future__.set_swap_module_params_on_conversion(True)  # else ``to`` would untie tied weights of subclasses
    return NAME


def _copied(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _raw(target).copy_(_raw(source))
    return target


def _arange(*bounds: Any, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    return Pretend(torch.arange(*bounds, dtype=dtype))


LIBRARIES: list[torch.library.Library] = []
"""What is registered lives as long as these."""
