"""A second device for tests: the CPU under another name, so that runs on it must have the CPU's bits, and mixing the two is an error.

Inside `accelerator()` a tensor is on `fake:0` if its storage is marked so. Two modes of torch keep that up. A function mode sees calls from
Python: what a tensor says of its device, moves between devices, and NumPy, which cannot read a device's memory. A dispatch mode sees every
operation, also those of C++ and of the backward pass: results of tensors of the device are on the device; tensors of both are refused, but
for what CUDA allows (copies, scalars among elementwise operations, indices on the CPU). As on MPS there is no float64.

All storages are the CPU's, and so are all kernels, attention's and the optimisers' too. What it does not show: other kernels' rounding,
asynchronous execution, a generator of random numbers of its own, memory that runs out.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.quantizers import quantizer_bnb_4bit, quantizer_bnb_8bit

NAME = "fake"
CPU = torch.device("cpu")
aten = torch.ops.aten
CROSSING = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index}  # a tensor of the device takes indices of the CPU
ADAM = {aten._fused_adam_, aten._fused_adamw_}  # may keep their count of steps on the CPU
MAKERS = (torch.tensor, torch.as_tensor)  # build on the CPU and move inside C++, below the modes
SET_DEVICE = PartialState.set_device
GROUPS = torch._C._group_tensors_by_device_and_dtype
DEVICE, IS_CPU = Tensor.device.__get__, Tensor.is_cpu.__get__  # type: ignore[attr-defined]


def on_device(tensor: Tensor) -> bool:
    """Is the tensor's memory that of the emulated device?"""
    with torch._C.DisableTorchFunction():
        return tensor.layout == torch.strided and tensor.device == CPU and getattr(tensor.untyped_storage(), NAME, False)


def _tensors(value: Any) -> list[Tensor]:
    """Those in the arguments or the results of an operation."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for one in inner for tensor in _tensors(one)]


class _Module:
    """What torch asks of the module `torch.fake`."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        """Autocast is there, and does nothing: what it would cast are the CPU's operations."""
        return [torch.float16, torch.bfloat16]

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """Its random numbers are the CPU's."""


@contextlib.contextmanager
def accelerator() -> Iterator[torch.device]:
    """`fake:0` is there, and Trainer, accelerate and bitsandbytes choose it."""
    torch.utils.rename_privateuse1_backend(NAME)  # for the rest of the process: nothing else has such a device
    if not hasattr(torch, NAME):
        torch._register_device_module(NAME, _Module)
    device = torch.device(NAME, 0)
    placed = {"update_device_map": lambda self, device_map: device_map or {"": device}}
    with contextlib.ExitStack() as stack:
        stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        stack.enter_context(mock.patch.dict("os.environ", ACCELERATE_TORCH_DEVICE=str(device)))
        for quantizer in (quantizer_bnb_4bit.Bnb4BitHfQuantizer, quantizer_bnb_8bit.Bnb8BitHfQuantizer):
            stack.enter_context(mock.patch.multiple(quantizer, **placed))
        stack.enter_context(mock.patch.object(PartialState, "set_device", _set_device))
        AcceleratorState._reset_state(reset_partial_state=True)
        stack.enter_context(mock.patch.object(torch._C, GROUPS.__name__, _grouped))
        operations = stack.enter_context(_Operations(device))
        stack.enter_context(_Calls(device, operations))
        yield device


def _set_device(state: PartialState) -> None:
    """The variable names the device, but not where the CPU is asked for (training.use_cpu)."""
    if state._cpu:
        state.device = CPU
    SET_DEVICE(state)


def _grouped(*args: Any) -> Any:
    """Lists of tensors by device and dtype, of which C++ sees the CPU's only."""
    return {(lists[0][0].device, dtype): (lists, places) for (_, dtype), (lists, places) in GROUPS(*args).items()}


class _Calls(TorchFunctionMode):
    """What Python sees of a tensor's device."""

    def __init__(self, device: torch.device, operations: "_Operations") -> None:
        super().__init__()
        self._device, self._operations = device, operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == DEVICE:
            return self._of(args[0])
        if func == IS_CPU:
            return self._of(args[0]).type == "cpu"
        if func is Tensor.numpy and on_device(args[0]):
            raise TypeError(f"can't convert {self._device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory")
        if func in MAKERS and kwargs.get("device") is not None:
            return self._moved(func(*args, **{**kwargs, "device": None}), torch.device(kwargs["device"]))
        if func is Tensor.cpu:
            return self._moved(args[0], CPU)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        return func(*args, **kwargs)

    def _of(self, tensor: Tensor) -> torch.device:
        return self._device if on_device(tensor) else DEVICE(tensor)

    def _to(self, tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            device, dtype = self._of(args[0]), args[0].dtype
        else:
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        return self._moved(tensor, device, dtype, copy)

    def _moved(self, tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None = None, copy: bool = False) -> Tensor:
        """As `Tensor.to`: the tensor itself where there is nothing to do."""
        here = self._of(tensor)
        device, dtype = device or here, dtype or tensor.dtype
        if (device.type, dtype) == (here.type, tensor.dtype) and not copy:
            return tensor
        with mock.patch.object(self._operations, "moving", True):
            return aten._to_copy(tensor, dtype=dtype, device=device)


class _Operations(TorchDispatchMode):
    """What is computed, and where.

    C++ calls the device of every tensor the CPU (the backward pass of a change of dtype does so, for instance): the CPU is meant only
    where Python is `moving` something, or where a tensor is made from none.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device, self.moving = device, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = dict(kwargs or {}), func.overloadpacket
        with torch._C.DisableTorchFunction():
            tensors = _tensors((args, kwargs))
            here = [tensor for tensor in tensors if on_device(tensor)]
            if len(here) not in (0, len(tensors)) and packet not in CROSSING:
                self._require_allowed(func, packet, args, tensors)
            wanted = kwargs.get("device")
            to_device = torch.device(wanted or CPU).type == NAME or (bool(here) and not (wanted and self.moving))
            if wanted is not None and to_device:
                kwargs["device"] = CPU
                if kwargs.get("generator") is not None:
                    raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
            result = func(*args, **kwargs)
            if to_device:
                known = {tensor.untyped_storage()._cdata for tensor in tensors if tensor.layout == torch.strided}
                for tensor in _tensors(result):
                    if tensor.untyped_storage()._cdata not in known:
                        self._mark(tensor)
            return result

    def _mark(self, tensor: Tensor) -> None:
        if tensor.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a {NAME} Tensor to float64 dtype, as this device has none: move it to the CPU first")
        setattr(tensor.untyped_storage(), NAME, True)

    def _require_allowed(self, func: Any, packet: Any, args: Any, tensors: list[Tensor]) -> None:
        others = [tensor for tensor in tensors if not on_device(tensor)]
        scalars = all(tensor.dim() == 0 for tensor in others)
        indices = all(tensor.dtype in (torch.int64, torch.bool) for tensor in others if tensor.dim())
        if scalars and (torch.Tag.pointwise in func.tags or packet in ADAM):
            return
        if indices and packet in INDEXING and on_device(args[0]):
            return
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {self._device} and cpu, in {func}")
