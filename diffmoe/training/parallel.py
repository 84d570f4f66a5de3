"""One model on several processes: a copy each (DDP), or a share of every tensor each (FSDP2).

Gradients are averaged over processes either way. Buffers (thresholds) stay whole and belong to the trainer: no wrapper
sends them around. FSDP shares out weights, gradients, moments and averages, block by block; a state in full is the same
names and shapes at any number of processes, so that a checkpoint of eight loads in one, and back.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.export import register_dataclass
from torch.nn.parallel import DistributedDataParallel

from diffmoe.config import Parallel, PoolScope, Precision, RunConfig, require
from diffmoe.models.dit import DiT, ModelOutput
from diffmoe.moe.routing import Routing
from diffmoe.training.distributed import World
from diffmoe.training.graph import compile_blocks

T = TypeVar("T", Tensor, Tensor | None)

for output in (ModelOutput, Routing):  # else FSDP of torch 2.11 does not see the tensors in them and loses gradients
    register_dataclass(output)


def distribute(model: DiT, averages: Sequence[DiT], config: RunConfig, world: World, device: torch.device) -> nn.Module:
    """Make `model` train together with those of the other processes; return the network to call.

    Gradients are averaged in its backward, but under DDP those of `exact_parameters`. Under FSDP its parameters are
    replaced by their shares, as are those of the averages, copies of it made before. An optimiser is made afterwards.

    Raises:
        ConfigError: for a compiler that is known to get gradients wrong.
    """
    if config.model.moe is not None and config.model.moe.pool_scope is PoolScope.GLOBAL:
        for layer in model.moe_layers().values():
            layer.router.world = world
    if config.runtime.compiles(device.type):
        # Seen with 2.11 and 2.13, whose C++ has the gates' gradients 56 % off; not with 2.14.
        require(device.type != "cpu" or torch.__version__ >= "2.14", "runtime.compile", True,
                f"on a CPU torch {torch.__version__} compiles wrong gradients; use false, or torch 2.14")
        compile_blocks(model.blocks)
    if world.size > 1 and config.runtime.parallel is Parallel.FSDP:
        mesh = init_device_mesh(device.type, (world.size,))
        for sharded in (model, *averages):
            _shard(sharded, mesh, config.training.precision)
        return model
    if world.size == 1:
        return model
    torch._dynamo.config.optimize_ddp = False  # would cut the compiled blocks where DDP's buckets end
    exact = {id(parameter) for parameter in exact_parameters(model)}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [name for name, parameter in model.named_parameters() if id(parameter) in exact])
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.14 renames the option
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def accumulating(network: nn.Module) -> contextlib.AbstractContextManager:
    """Return the context of forward and backward of a micro-batch that others follow: DDP sends nothing yet.

    FSDP does, for a process has no room for all gradients.
    """
    return network.no_sync() if isinstance(network, DistributedDataParallel) else contextlib.nullcontext()


def exact_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the float32 parameters of a model whose others are bf16 copies; of any other model none.

    DDP would fill a bucket with the routers of many blocks, and all gradients behind it would wait for the last one.
    """
    parameters = list(model.parameters())
    mixed = len({parameter.dtype for parameter in parameters}) > 1
    return [parameter for parameter in parameters if mixed and parameter.dtype is torch.float32]


def _shard(model: DiT, mesh: DeviceMesh, precision: Precision) -> None:
    """Shard block by block; in bf16 blocks travel as autocast would cast them, routers and embeddings as they are.

    Routers go with the embeddings: as groups of their own they would cut the compiled blocks. What is gathered stays
    until the backward has used it, 2 bytes a parameter beside the 16 of weight, moments and average that are shared.
    """
    # Tokens and pairs that a block returns are views; nobody writes into them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)  # the residual stream keeps its precision, too
    cast = whole
    if precision is Precision.BF16:
        cast = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    def of_routers() -> set[nn.Parameter]:
        return {parameter for layer in model.moe_layers().values() for parameter in layer.router.parameters()}

    fully_shard(model, mesh=mesh, mp_policy=whole, ignored_params=set(model.blocks.parameters()) - of_routers())
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=cast, ignored_params=of_routers(), reshard_after_forward=False)


def local(tensors: Sequence[T]) -> list[T]:
    """Return what this process holds of each tensor, in the same memory: enough for work entry by entry."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor in full, the same on every process; every one must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(state: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Collect a state in full on the main process, tensor by tensor into host memory; every process must call it.

    Returns:
        the state; in other processes, and only if anything was shared out, nothing.
    """
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return dict(state)
    full: dict[str, Tensor] = {}
    for name, tensor in state.items():
        value = whole(tensor)
        if world.is_main:
            full[name] = value.detach().cpu()
    return full


def shared_out(full: Tensor, like: Tensor) -> Tensor:
    """Return `full` shared out as `like` is; every process has it in full, and nothing is sent."""
    if not isinstance(like, DTensor):
        return full
    full = full.to(like.device, like.dtype)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
