"""A second device that is none: finds code that mixes tensors of the CPU and of a GPU, on a machine without a GPU.

Tensors that are moved to the device `OTHER` stay in the memory of the CPU and are marked. An operation that mixes marked and
unmarked tensors raises, with CUDA's rules: a tensor without dimensions, an index, and a copy may come from the CPU.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from mae_et.engine.distributed import World

OTHER = torch.device("xpu", 0)  # any type that torch knows and the code does not name
CPU = torch.device("cpu")
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]
TO_HOST = {Tensor.numpy, Tensor.__array__}


class Marks:
    """The device of storages. Some have none: what an operation makes inside, e.g. zeros that it fills."""

    def __init__(self) -> None:
        self.devices: dict[
            int, tuple[torch.device, StorageWeakRef]
        ] = {}  # a weak reference keeps the number from new use

    def get(self, tensor: Tensor) -> torch.device | None:
        if tensor.layout != torch.strided or tensor.is_meta:
            return None
        return self.devices.get(tensor.untyped_storage()._cdata, (None,))[0]

    def set(self, tensor: Tensor, device: torch.device) -> None:
        if tensor.layout == torch.strided and not tensor.is_meta:
            storage = tensor.untyped_storage()
            self.devices[storage._cdata] = device, StorageWeakRef(storage)


MARKS = Marks()  # one for all, because the code keeps tensors for later calls


class _Operations(TorchDispatchMode):
    """Checks each operation, and marks what comes from marked tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        name = func._schema.name.split("::")[1]
        devices = [MARKS.get(x) for x in tensors]
        result = func(*args, **kwargs)
        if name in ("copy_", "_has_compatible_shallow_copy_type"):
            return result
        judged = devices[:1] if name in INDEXING else [d for x, d in zip(tensors, devices, strict=True) if x.ndim]
        found = {device for device in judged or devices if device is not None}
        if len(found) > 1:
            shapes = [f"{device} {tuple(x.shape)}" for x, device in zip(tensors, devices, strict=True)]
            raise RuntimeError(f"{func} mixes devices: {', '.join(shapes)}")
        for x in tree_flatten(result)[0]:
            if isinstance(x, Tensor) and found:
                MARKS.set(x, *found)
        return result


class OtherDevice(TorchFunctionMode):
    """While it is active, tensors can be moved to `OTHER`, and say that they are there."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = _Operations()

    def __enter__(self) -> OtherDevice:
        self.operations.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.operations.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == DEVICE:  # a new object at each access
            return OTHER if MARKS.get(args[0]) == OTHER else func(*args, **kwargs)
        if func in (torch._C._nn._parse_to, torch.device):  # the first is a part of Module.to
            return func(*args, **kwargs)
        if func in TO_HOST and MARKS.get(args[0]) == OTHER:
            raise TypeError("a tensor on a GPU cannot be converted to numpy: call .cpu() first")
        wanted = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, (torch.device, str)) and _is_device(x)]
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            wanted, args = [MARKS.get(args[1]) or CPU], (args[0], args[1].dtype, *args[2:])
        if func is Tensor.cpu:
            wanted = [CPU]
        args, kwargs = tree_map(
            lambda x: CPU if isinstance(x, (torch.device, str)) and _is_device(x) else x, (args, kwargs)
        )
        result = func(*args, **kwargs)
        if wanted:
            target = OTHER if torch.device(wanted[0]).type == OTHER.type else CPU
            return tree_map(lambda x: _placed(x, target) if isinstance(x, Tensor) else x, result)
        for x in tree_flatten(result)[0]:
            if isinstance(x, Tensor) and MARKS.get(x) is None:
                MARKS.set(x, CPU)
        return result


def _placed(tensor: Tensor, target: torch.device) -> Tensor:
    if MARKS.get(tensor) not in (None, target):
        tensor = tensor.clone()  # a copy through autograd, as between two devices
    MARKS.set(tensor, target)
    return tensor


def _is_device(value: torch.device | str) -> bool:
    return str(value).split(":")[0] in (OTHER.type, "cpu")


@contextlib.contextmanager
def trainings_on_the_other_device(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets `join_world` give `OTHER`, wherever it was imported, and generators of `OTHER` be made."""
    make_generator = torch.Generator
    patch.setattr(
        torch,
        "Generator",
        lambda device=CPU: make_generator(CPU if torch.device(device).type == OTHER.type else device),
    )

    @contextlib.contextmanager
    def join(device: str | None = None) -> Iterator[World]:
        yield World(0, 1, 1, OTHER)

    for module in list(sys.modules.values()):
        found: Callable | None = getattr(module, "join_world", None) if module.__name__.startswith("mae_et.") else None
        if found is not None:
            patch.setattr(module, "join_world", join)
    with OtherDevice():
        yield
