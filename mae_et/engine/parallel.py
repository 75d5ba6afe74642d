"""Wraps a model for the training: activation checkpointing, then torch.compile, then DDP or FSDP2. The one place that does.

FSDP2 (`fully_shard`) replaces each parameter by a part of it (a DTensor) in place. So the optimizer and the moving average
follow here, and so does a change of the input size, which needs the whole parameters.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mae_et.config.schema import RunConfig
from mae_et.curriculum.plan import Plan
from mae_et.engine.compilation import compile_modules
from mae_et.engine.distributed import World
from mae_et.engine.hardware import release_freed_memory
from mae_et.engine.precision import autocast_dtype
from mae_et.engine.task import Task
from mae_et.errors import CheckpointError, UserError
from mae_et.models.sizes import Size
from mae_et.storage.sharded_checkpoint import read_tensors, stored_tensors


def is_sharded(run: RunConfig, world: World) -> bool:
    """Returns whether the parameters are divided among the processes. One process has nothing to divide."""
    return run.parallel == "fsdp" and world.size > 1


def build_on_device(build: Callable[[], nn.Module], run: RunConfig, world: World) -> Any:
    """Builds a model on the device of this process.

    Under FSDP2 only the main process computes and holds the initial values. The others build on the meta device, and get
    their parts from the main process in `Parallel`.
    """
    if is_sharded(run, world) and not world.is_main:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is a no-op")  # weights that are loaded into it
            return build()
    return build().to(world.device)


def is_without_values(model: nn.Module) -> bool:
    """Returns whether this process gets the initial values from the main process, so that it need not load any."""
    return any(parameter.is_meta for parameter in model.parameters())


def moving_average(model: nn.Module, decay: float) -> ModelEmaV3:
    """Returns the moving average of a model's weights, also of a model without values."""
    if not is_without_values(model):
        return ModelEmaV3(model, decay=decay)
    # timm makes a random generator on the model's device, and the meta device has none.
    average = ModelEmaV3(nn.Linear(1, 1), decay=decay)
    average.module = copy.deepcopy(model).eval()
    return average


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the repeated units of a model: transformer blocks, the bottlenecks of a ResNet.

    A unit is a member of a ModuleList or Sequential whose members all have submodules and parameters. A member that holds
    most of its parameters in such lists of its own is a stage, and its members are taken in its place.
    """
    found: list[nn.Module] = []
    members = list(model.children())
    is_list = isinstance(model, (nn.ModuleList, nn.Sequential)) and all(
        _num_parameters(member) == 0 or next(member.children(), None) is not None for member in members
    )
    for member in members:
        inside = find_blocks(member)
        if not is_list or 2 * sum(map(_num_parameters, inside)) > _num_parameters(member):
            found += inside
        elif _num_parameters(member):
            found.append(member)
    return list(dict.fromkeys(found))


class Parallel:
    """How the model of a task runs: compiled, with activation checkpointing, on one or several processes.

    Under FSDP2 the model, its average and the optimizer are sharded by the constructor.

    Args:
        task: its model, and its average if there is one.
        optimizer: of the model's parameters.
        world: this process among the others.
        run: `parallel`, `data_parallel_shard_degree`, `gradient_dtype`, `compile`, `activation_checkpointing`, `precision`.
        plan: of the run; one graph is compiled for each of its input sizes.
    Raises:
        UserError: if the processes cannot be divided into groups of `run.data_parallel_shard_degree`.
    """

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer, world: World, run: RunConfig, plan: Plan) -> None:
        self.task, self.optimizer, self.world, self.run, self.plan = task, optimizer, world, run, plan
        self.dtype = autocast_dtype(run.precision, world.device)
        self.is_sharded = is_sharded(run, world)
        if self.is_sharded:
            self.mesh = make_mesh(world, run.data_parallel_shard_degree)
            self._shard()
        else:
            self._prepare(task.model, [task.model])

    def wrap(self) -> nn.Module:
        """Returns the module to call in a training step. Its backward pass averages the gradients over the processes."""
        model, world = self.task.model, self.world
        if world.size == 1 or self.is_sharded:
            return model
        device_ids = [world.device.index] if world.device.type == "cuda" else None
        # Buffers are fixed tables, or statistics of which the main process's count: there is nothing to broadcast.
        # No static graph: its first backward pass must average the gradients, which that of a first micro batch does not.
        wrapped = DistributedDataParallel(
            model, device_ids=device_ids, gradient_as_bucket_view=True, broadcast_buffers=False
        )
        if self.run.gradient_dtype == "bf16":
            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped

    @contextlib.contextmanager
    def micro_batch(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        """Lets the processes average the gradients at the last micro batch only.

        FSDP2 reduces those of each micro batch within a sharding group: whole gradients would need the memory that sharding
        saves. Groups (HSDP) average at the last one.
        """
        if isinstance(model, FSDPModule):
            model.set_requires_all_reduce(is_last)
            model.set_is_last_backward(is_last)
        elif isinstance(model, DistributedDataParallel) and not is_last:
            with model.no_sync():
                yield
            return
        yield

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Puts whole copies in the place of the task's sharded model and average.

        So a process can call them any number of times, or not at all, copy them and take their state. All processes enter
        together. The memory of the whole parameters in float32 is needed meanwhile.
        """
        if not self.is_sharded:
            yield
            return
        sharded = self._nets()
        self._set_nets({part: self._whole_net(part) for part in sharded})
        try:
            yield
        finally:
            self._set_nets(sharded)

    def enter_bandwidth(self, size: Size) -> bool:
        """Calls the task's method of this name. Under FSDP2 with the whole model, which is sharded again afterwards.

        Returns:
            Whether the model must be wrapped again.
        """
        if not self.is_sharded or type(self.task).enter_bandwidth is Task.enter_bandwidth:
            return self.task.enter_bandwidth(size, self.optimizer)
        self._assemble()
        self.task.enter_bandwidth(size, self.optimizer)
        self._shard()
        return True

    # ---- state ----

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors themselves by name: "model.NAME", "ema.NAME" and "optimizer.NAME_OF_PARAMETER.KEY"."""
        found = {
            f"{part}.{name}": value for part, net in self._nets().items() for name, value in net.state_dict().items()
        }
        for name, parameter in self._named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{key}"] = value
        return found

    def state(self) -> dict[str, Any]:
        """Returns model, optimizer and average as a single-file checkpoint holds them."""
        return {
            "optimizer": self.optimizer.state_dict(),
            **{part: net.state_dict() for part, net in self._nets().items()},
        }

    def optimizer_values(self) -> list[dict[str, Any]]:
        """Returns what the optimizer's groups hold besides parameters."""
        return [{k: v for k, v in group.items() if k not in _PARAMETERS} for group in self.optimizer.param_groups]

    def read(self, path: Path, values: Mapping[str, Any]) -> None:
        """Reads a sharded checkpoint in place; also into an unsharded model.

        Args:
            path: of the checkpoint.
            values: its plain values.
        Raises:
            CheckpointError: if it is of another model or optimizer.
        """
        parts = ("optimizer", *self._nets())  # an average that this run does not keep is left out
        stored = {name: entry for name, entry in stored_tensors(path).items() if name.partition(".")[0] in parts}
        self._make_optimizer_state({name: tuple(entry.size) for name, entry in stored.items()})
        tensors = self.tensors()
        if differing := sorted(tensors.keys() ^ stored.keys()):
            raise CheckpointError(f"{len(differing)} tensors are on one side only, the first: {differing[0]}")
        read_tensors(path, tensors, self.world.control)
        for group, saved in zip(self.optimizer.param_groups, values["optimizer_values"], strict=True):
            group.update(saved)

    def load(self, state: Mapping[str, Any]) -> None:
        """Loads the content of a single-file checkpoint into the sharded model: each process copies its parts.

        Raises:
            KeyError: if it is of another model or optimizer.
        """
        whole = {f"{part}.{name}": value for part in self._nets() for name, value in state[part].items()}
        saved = state["optimizer"]
        for group in saved["param_groups"]:
            for name, index in zip(group["param_names"], group["params"], strict=True):
                for key, value in saved["state"].get(index, {}).items():
                    whole[f"optimizer.{name}.{key}"] = value
        self._make_optimizer_state({name: tuple(value.shape) for name, value in whole.items()})
        self._copy_in(whole)

    def _make_optimizer_state(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Makes zeros for the optimizer's tensors of these names."""
        parameters = dict(self._named_parameters())
        for name, shape in shapes.items():
            part, _, rest = name.partition(".")
            owner, _, key = rest.rpartition(".")
            if part == "optimizer" and owner in parameters:
                parameter = parameters[owner]
                on_device = key != "step" or self.optimizer.defaults.get(
                    "fused"
                )  # torch keeps other step counters on the host
                self.optimizer.state[parameter][key] = (
                    torch.zeros_like(parameter)
                    if shape == tuple(parameter.shape)
                    else torch.zeros(shape, device=parameter.device if on_device else "cpu")
                )

    def _copy_in(self, whole: Mapping[str, Tensor]) -> None:
        tensors = self.tensors()
        for name in tensors.keys() | whole.keys():
            _copy(tensors[name], whole[name])

    # ---- FSDP2 ----

    def _shard(self) -> None:
        """Shards the model, its average and the optimizer, with the values of the main process."""
        # What whole copies are built from: as the models are now, but without values.
        self.blank = {part: _without_values(net) for part, net in self._nets().items()}
        owners = {id(parameter): name for name, parameter in self._named_parameters()}
        state = {owners[id(parameter)]: entries for parameter, entries in self.optimizer.state.items()}
        reduce_dtype = torch.bfloat16 if self.run.gradient_dtype == "bf16" else torch.float32
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=reduce_dtype)
        # Images, targets and noise keep their precision: the root casts nothing.
        root_policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
        for net in self._nets().values():
            net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 refuses channels_last
            whole = _all_tensors(net)
            blocks = find_blocks(net)
            if net is self.task.model:
                self._prepare(net, blocks or [net])
            for block in blocks:
                fully_shard(block, mesh=self.mesh, mp_policy=policy)
            fully_shard(net, mesh=self.mesh, mp_policy=root_policy, reshard_after_forward=False)
            if not self.world.is_main:
                net.to_empty(device=self.world.device)
            for name, target in _all_tensors(net).items():
                source = whole.pop(name)
                if not self.world.is_main:
                    source = torch.empty(target.shape, dtype=target.dtype, device=self.world.device)
                dist.broadcast(source, 0)
                _copy(target, source)
        if self.task.ema is not None:
            self.task.ema.foreach = False  # its fused update refuses parameters (DTensors) beside buffers
        self._follow(state)
        release_freed_memory()  # of the whole model in the main process

    def _assemble(self) -> None:
        """Puts whole models and the whole optimizer state in the place of the sharded ones."""
        state = {
            name: {key: _whole(value) if isinstance(value, Tensor) else value for key, value in entries.items()}
            for name, parameter in self._named_parameters()
            if (entries := self.optimizer.state.get(parameter))
        }
        self._set_nets({part: self._whole_net(part) for part in self._nets()})
        self._follow(state)

    def _whole_net(self, part: str) -> nn.Module:
        """Returns a copy of a sharded model that is not sharded."""
        net, built = self._nets()[part], copy.deepcopy(self.blank[part])
        for name, module in built.named_modules():
            source = net.get_submodule(name)
            for key, parameter in source._parameters.items():
                if parameter is not None:
                    module._parameters[key] = nn.Parameter(_whole(parameter.detach()), parameter.requires_grad)
            for key, buffer in source._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.clone()
        return built.train(net.training)

    def _set_nets(self, nets: Mapping[str, nn.Module]) -> None:
        self.task.model = nets["model"]
        if self.task.ema is not None:
            self.task.ema.module = nets["ema"]

    def _follow(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Gives the optimizer the parameters that the model has now.

        Args:
            state: by name of the parameter. Tensors of the parameter's shape are sharded like the parameter.
        """
        parameters = dict(self.task.model.named_parameters())
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group["params"] = [parameters[name] for name in group["param_names"]]
        for name, entries in state.items():
            parameter = parameters[name]
            for key, value in entries.items():
                is_moment = isinstance(value, Tensor) and value.shape == parameter.shape
                if is_moment and isinstance(parameter, DTensor) and not isinstance(value, DTensor):
                    value = _part_of(value, parameter)
                self.optimizer.state[parameter][key] = value

    def _prepare(self, model: nn.Module, compiled: list[nn.Module]) -> None:
        if self.run.activation_checkpointing:
            cast(Any, model).set_grad_checkpointing(True)
        if self.run.compile:
            compile_modules(compiled, self.plan)

    def _nets(self) -> dict[str, nn.Module]:
        ema = self.task.ema
        return {"model": self.task.model, **({} if ema is None else {"ema": ema.module})}

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for group in self.optimizer.param_groups:
            yield from zip(group["param_names"], group["params"], strict=True)


_PARAMETERS = ("params", "param_names")


def make_mesh(world: World, shard_degree: int | None) -> DeviceMesh:
    """Returns the mesh of FSDP2: one dimension, or two for HSDP (replicate, shard).

    Args:
        world: this process among the others.
        shard_degree: processes that share one copy of the parameters; None: all.
    Raises:
        UserError: if they do not divide the processes.
    """
    degree = shard_degree or world.size
    if world.size % degree:
        divisors = ", ".join(str(n) for n in range(2, world.size + 1) if world.size % n == 0)
        raise UserError(
            f"run.data_parallel_shard_degree = {degree} does not divide the {world.size} processes: set it to one of {divisors}, "
            "or to None for all of them"
        )
    if degree == world.size:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    return init_device_mesh(world.device.type, (world.size // degree, degree), mesh_dim_names=("replicate", "shard"))


def whole_norm(norm: Tensor) -> Tensor:
    """Returns the norm over all processes, of a norm of sharded gradients."""
    return _whole(norm)


def local(tensor: Tensor) -> Tensor:
    """Returns this process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _part_of(whole: Tensor, like: DTensor) -> DTensor:
    """Returns a whole tensor as one that is sharded like another. No communication: each process cuts out its part."""
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _copy(target: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor into a target that may be sharded."""
    if target.shape != whole.shape:
        raise ValueError(f"a tensor has shape {tuple(whole.shape)}, the model's {tuple(target.shape)}")
    with torch.no_grad():
        source = _part_of(whole, target) if isinstance(target, DTensor) else whole
        local(target).copy_(local(source))


def _all_tensors(net: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and all buffers, also those that are not part of the state."""
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def _without_values(net: nn.Module) -> nn.Module:
    """Copies a model with parameters and buffers that take no memory."""
    memo: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in net.buffers()}
    for parameter in net.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return copy.deepcopy(net, memo)


def _num_parameters(module: nn.Module) -> int:
    return sum(math.prod(parameter.shape) for parameter in module.parameters())
