"""One model on several processes: a whole one each (DDP), or a share of every tensor each (FSDP2).

Gradients are averaged over processes either way. Buffers (thresholds) stay whole and belong to the trainer: no wrapper
sends them around. FSDP shares out weights, gradients, moments and averages. Where bf16 copies train, each process of
DDP has them whole, and what lies behind them is shared out, float32 weights, moments and averages: it gets its part of
a gradient's mean, moves its part of the weights and sends its part of the new copies (the first stage of ZeRO, arXiv
1910.02054). As many bytes travel as for a mean in full, and no weight is moved twice.

A state in full is the same names and shapes at any number of processes, so that a checkpoint of eight loads in one, and
back.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
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


LEAST_SENT = 2**19
"""Elements of a tensor that is worth sharing out; what is smaller is averaged together and moved by all processes."""
SENT_TOGETHER = 2**25
"""Elements of gradients that are sent together: every kernel of NCCL waits for the other processes, and for room."""
BLOCKS_SENT = 2
"""Blocks whose weights and gradients FSDP sends together: of fewer, the host would be slower than the GPU."""

# torch 2.14 has new names for what is used here; 2.11 does not know them.
warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)


def distribute(model: DiT, trained: DiT, averages: Sequence[DiT], config: RunConfig, world: World,
               device: torch.device) -> nn.Module:
    """Make `trained` train together with those of the other processes; return the network to call.

    Its gradients are averaged in its backward, but those of copies by `GradientParts`. What is shared out of the model
    and the averages, copies of it made before, is replaced by this process's share. An optimiser is made afterwards.

    Args:
        model: holds the weights.
        trained: the model itself, or a network with bf16 copies of some of its parameters, and the others themselves.

    Raises:
        ConfigError: for a compiler that is known to get gradients wrong.
    """
    if config.model.moe is not None and config.model.moe.pool_scope is PoolScope.GLOBAL:
        for layer in trained.moe_layers().values():
            layer.router.world = world
    if config.runtime.compiles(device.type):
        # Seen with 2.11 and 2.13, whose C++ has the gates' gradients 56 % off; not with 2.14.
        require(device.type != "cpu" or torch.__version__ >= "2.14", "runtime.compile", True,
                f"on a CPU torch {torch.__version__} compiles wrong gradients; use false, or torch 2.14")
        compile_blocks(trained.blocks)
    if world.size == 1:
        return trained
    if config.runtime.parallel is Parallel.FSDP:
        mesh = init_device_mesh(device.type, (world.size,))
        for sharded in (model, *averages):
            _shard(sharded, mesh, config.training.precision)
        return trained
    if trained is not model:
        _share_out(trained, (model, *averages), init_device_mesh(device.type, (world.size,)))
        return trained
    torch._dynamo.config.optimize_ddp = False  # would cut the compiled blocks where DDP's buckets end
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.14 renames the option
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def accumulating(network: nn.Module) -> contextlib.AbstractContextManager:
    """Return the context of forward and backward of a micro-batch that others follow: DDP sends nothing yet.

    FSDP does, for a process has no room for all gradients.
    """
    return network.no_sync() if isinstance(network, DistributedDataParallel) else contextlib.nullcontext()


def _share_out(trained: DiT, held: Sequence[DiT], mesh: DeviceMesh) -> None:
    """Share out the rows of large tensors of which bf16 copies train; `held` are the networks that hold them.

    Where rows are no multiple of the processes (16 experts, 32 GPUs), as many leading dimensions as it takes become
    one: a tensor that is shared out may have another shape than its copy, with the same order in memory.
    """
    for name, copied in trained.named_parameters():
        if copied.dtype is torch.float32 or copied.numel() < LEAST_SENT or copied.numel() % mesh.size() != 0:
            continue
        last = next(index for index, rows in enumerate(itertools.accumulate(copied.shape, operator.mul))
                    if rows % mesh.size() == 0)
        path, _, leaf = name.rpartition(".")
        for network in held:
            module = network.get_submodule(path)
            parameter = module.get_parameter(leaf)
            mine = parameter.detach().flatten(0, last).chunk(mesh.size())[mesh.get_local_rank()].clone()
            shared = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False)
            setattr(module, leaf, nn.Parameter(shared, parameter.requires_grad))


class GradientParts:
    """Averages the gradients of a network with bf16 copies: of what is shared out, this process's part.

    Large ones travel as they are, in a backward as soon as it has made them.

    Args:
        trained: what has the gradients.
        parameters: the weights behind them, in the same order.
        world: the processes.
    """

    def __init__(self, trained: Sequence[nn.Parameter], parameters: Sequence[nn.Parameter], world: World) -> None:
        self.world = world
        self.waiting: list[tuple[Tensor, Tensor]] = []
        """A gradient, and this process's part of it."""
        self.under_way: list[Any] = []
        self.small: list[nn.Parameter] = []
        for copied, parameter in zip(trained, parameters, strict=True):
            if isinstance(parameter, DTensor):
                copied.register_post_accumulate_grad_hook(functools.partial(self._add, parameter))
            elif copied.numel() >= LEAST_SENT:
                copied.register_post_accumulate_grad_hook(self._send_whole)
            else:
                self.small.append(copied)

    def _add(self, parameter: DTensor, copied: nn.Parameter) -> None:
        self.waiting.append((copied.grad, own_part(copied.grad, parameter)))
        if sum(gradient.numel() for gradient, _ in self.waiting) >= SENT_TOGETHER:
            self._send()

    def _send(self) -> None:
        with _together() as started:
            for gradient, mine in self.waiting:
                dist.reduce_scatter_tensor(mine, gradient.view(-1), dist.ReduceOp.AVG, async_op=True)
        self.under_way.append(started)
        self.waiting.clear()

    def _send_whole(self, copied: nn.Parameter) -> None:
        self.under_way.append(dist.all_reduce(copied.grad, dist.ReduceOp.AVG, async_op=True))

    def finish(self) -> None:
        """Wait for the means that a backward has started, and make those of all small tensors together."""
        if self.waiting:
            self._send()
        for started in self.under_way:
            started.wait()
        self.under_way.clear()
        gradients = [parameter.grad for parameter in self.small]
        torch._foreach_copy_(gradients, self.world.mean(gradients))


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a tensor, in the same memory and flat; all of it, if `like` is whole, too."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    if isinstance(like, DTensor):
        size = like.to_local().numel()
        return tensor.detach().view(-1).narrow(0, like.device_mesh.get_local_rank() * size, size)
    return tensor


def send_parts(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Any]:
    """Start to send this process's part of each of some tensors, and to get the others'.

    Args:
        pairs: a tensor that every process shall have whole, and this one's part of it, in its memory.

    Returns:
        what to wait for.
    """
    if not pairs:
        return []
    with _together() as started:
        for tensor, mine in pairs:
            dist.all_gather_into_tensor(tensor, mine, async_op=True)
    return [started]


def _together() -> contextlib.AbstractContextManager[Any]:
    """Return the context of collectives of a kind that start together; it gives what to wait for."""
    from torch.distributed.distributed_c10d import _coalescing_manager  # it has no public name yet

    return _coalescing_manager(async_ops=True)


def _shard(model: DiT, mesh: DeviceMesh, precision: Precision) -> None:
    """Shard some blocks at a time; in bf16 they travel as autocast would cast them, routers and embeddings as they are.

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
    for start in range(0, len(model.blocks), BLOCKS_SENT):
        blocks = list(model.blocks[start:start + BLOCKS_SENT])
        fully_shard(blocks, mesh=mesh, mp_policy=cast, ignored_params=of_routers(), reshard_after_forward=False)


def local(tensors: Sequence[T]) -> list[T]:
    """Return what this process holds of each tensor, in the same memory: enough for work entry by entry."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor in full, the same on every process; every one must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size],
             world: World) -> Iterator[tuple[str, Tensor]]:
    """Collect a state in full, a tensor at a time, where it lies; every process must ask for all of them.

    Args:
        state: tensors by name, shared out or not.
        shapes: of those by name that are shared out in another one.
        world: the processes.

    Yields:
        name and tensor; in other processes than the main one, nothing.
    """
    for name, tensor in state.items():
        value = whole(tensor).detach()
        if world.is_main:
            yield name, value.view(shapes.get(name, value.shape))


def shared_out(full: Tensor, like: Tensor) -> Tensor:
    """Return `full` shared out as `like` is; every process has it in full, and nothing is sent."""
    if not isinstance(like, DTensor):
        return full
    full = full.to(like.device, like.dtype).view(like.shape)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
