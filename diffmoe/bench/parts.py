"""A training step, or a call at inference, taken apart: each part timed, with operations and bytes that it must move.

Parts of the network run on inputs as a step or a call hands them over, forward and in training backward, compiled and
captured like the whole; optimiser, average and data run as the trainer runs them. Bytes are the fewest: what enters,
leaves, or is kept for the backward between two products moves once each way (bf16 tokens, float32 residual stream and
master weights).

Shapes: S tokens of the batch, D width, F hidden width of a feed-forward network, E experts, T tokens a sample.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from diffmoe.bench.subjects import WARM_UP, network_inputs
from diffmoe.bench.timing import describe_error, free_memory, time_visit
from diffmoe.config import ModelConfig, RunConfig
from diffmoe.evaluation.sampling import FIRST_ROW_BOUND, inference_weights, prepare_call
from diffmoe.models.dit import Block, DiT
from diffmoe.models.kernels import product_dtype
from diffmoe.models.layers import NUM_FREQUENCIES
from diffmoe.moe.layer import MoE
from diffmoe.training.graph import EAGER_CALLS, Graphed
from diffmoe.training.precision import autocast
from diffmoe.training.trainer import Trainer

VISIT_SECONDS = 0.3
REPEATS = 8
"""Times that a part is called as one at inference, where it may be shorter than what starts it."""
WHOLE, WHOLE_CALL = "forward and backward", "network call"
"""The part that is not a part: what the network's parts add up to, in training and at inference."""
Forward = Callable[[], Any]
"""Returns tensors, or a tree of them, to go backward from."""


@dataclass(frozen=True)
class Part:
    """A part of a step."""

    name: str
    count: int
    """Times a step."""
    flops: float
    """Floating-point operations of one time."""
    bytes: float
    """Bytes that one time must move."""
    work: Callable[[], tuple[Forward, list[Tensor]]] | None = None
    """Makes the forward and lists the inputs and weights whose gradients the backward computes."""
    call: Callable[[], Any] | None = None
    """For what has no backward: the work itself."""
    is_compiled: bool = True
    """Whether the compiler has it where it has the blocks."""


@dataclass(frozen=True)
class Source:
    """What is taken apart: a network and what it is called with."""

    network: DiT
    """With the weights that are used: bf16 copies, where the whole has them."""
    config: RunConfig
    inputs: tuple[Tensor, Tensor, Tensor]
    """Images, times and labels."""
    backward: bool
    row_bound: float | None = None

    @property
    def device(self) -> torch.device:
        """Return where it runs."""
        return self.inputs[0].device

    @property
    def repeats(self) -> int:
        """Return how many times a part is called as one."""
        return 1 if self.backward else REPEATS


def time_parts(trainer: Trainer, only: str | None = None) -> list[dict[str, Any]]:
    """Return `name`, `count`, `ms` (of one time), `flops`, `bytes` and `how` of each part; `error` for one that failed.

    Args:
        trainer: whose step is taken apart.
        only: the name of a single part to time.

    The trainer is of no use for training afterwards: optimiser and average have moved without new gradients.
    """
    return _time(list_parts(trainer), _source(trainer), only)


def time_call_parts(model: DiT, config: RunConfig, batch: int, calls: int,
                    only: str | None = None) -> list[dict[str, Any]]:
    """Return the parts of some calls of a network at inference together, as `time_parts` does.

    Args:
        model: in eval mode.
        config: its run.
        batch: images of a call.
        calls: how many times `count` is about.
        only: the name of a single part to time.
    """
    compiled = bool(config.runtime.compile)
    inputs = network_inputs(config.model, batch, model.positions.device)
    network = prepare_call(model, config, FIRST_ROW_BOUND, compiled=compiled)
    source = Source(inference_weights(model, config, compiled=compiled), config, inputs, backward=False,
                    row_bound=FIRST_ROW_BOUND)
    with torch.no_grad():
        for _ in range(WARM_UP["forward"]):
            network(*inputs)
        parts = [*network_parts(source), Part(WHOLE_CALL, 1, 0.0, 0.0, call=lambda: network(*inputs))]
        return _time([replace(part, count=part.count * calls) for part in parts], source, only)


def _time(parts: list[Part], source: Source, only: str | None) -> list[dict[str, Any]]:
    found = []
    for part in parts:
        if only not in (None, part.name):
            continue
        line: dict[str, Any] = {"name": part.name, "count": part.count, "flops": part.flops, "bytes": part.bytes}
        try:
            call, how = (part.call, "as in the whole") if part.call else _prepare(part, source)
            ms = statistics.median(time_visit(call, VISIT_SECONDS, source.device))
            line |= {"ms": ms if part.call else ms / source.repeats, "how": how}
        except Exception as error:  # a part that cannot stand alone must not cost the others
            line["error"] = describe_error(error)
        found.append(line)
        call = None
        free_memory(source.device)
    return found


def list_parts(trainer: Trainer) -> list[Part]:
    """Return the parts of this trainer's step."""
    tensors = trainer.batch(0)
    step = (tensors.images, tensors.labels, tensors.noise, tensors.times)
    pixels = tensors.images.numel()
    return [
        *_update_parts(trainer),
        Part("data", 1, 2 * pixels, 9 * pixels, call=lambda: trainer.batch(1)),
        *network_parts(_source(trainer)),
        Part(WHOLE, 1, 0.0, 0.0, call=lambda: trainer.gradients(*step)),
    ]


def _source(trainer: Trainer) -> Source:
    batch = trainer.batch(0).rows(slice(0, trainer.micro_batch))
    return Source(trainer.network, trainer.config, (batch.images, batch.times, batch.labels), backward=True)


def network_parts(source: Source) -> list[Part]:
    """Return the parts of a network's forward, and backward if the source says so."""
    config, batch, backward = source.config.model, len(source.inputs[0]), source.backward
    inputs = _layer_inputs(source)
    moe = source.network.moe_layers()
    dense = [index for index in range(config.depth) if index not in moe]
    block = source.network.blocks[-1]  # the first has no residual yet
    parts = [
        Part("embeddings, final layer", 1, *ends_costs(config, batch, backward), is_compiled=False,
             work=lambda: _ends(source, inputs["final"])),
        Part("attention", config.depth, *attention_costs(config, batch, backward),
             work=lambda: _alone(block.attn, inputs["attention"])),
        Part("norms, modulation, residual", config.depth, *modulation_costs(config, batch, backward),
             work=lambda: _without_inner(block, inputs["block"])),
    ]
    tokens = batch * config.num_tokens
    if dense:
        ffn = source.network.blocks[dense[0]].ffn
        costs = feed_forward_costs(config.hidden_size, config.ffn_size, tokens, 1, backward)
        parts.append(Part("dense feed-forward", len(dense), *costs, work=lambda: _alone(ffn, inputs["dense"])))
    if moe:
        layer, bound, experts = next(iter(moe.values())), source.row_bound, config.moe.num_experts
        rows = int(config.moe.capacity * tokens) if backward else inputs["rows"]
        costs = feed_forward_costs(config.hidden_size, config.expert_size, rows, experts, backward)
        parts += [
            Part("routing", len(moe), *routing_costs(layer.router, config, batch, backward),
                 work=lambda: _routing(layer, inputs["moe"], bound)),
            Part("expert products", len(moe), *costs, work=lambda: _experts(layer, inputs["moe"], bound)),
        ]
    return parts


def _update_parts(trainer: Trainer) -> list[Part]:
    num = sum(parameter.numel() for parameter in trainer.model.parameters())
    decay = trainer.config.training.ema_decay(trainer.step + 1)
    if (one_pass := trainer.one_pass) is not None:  # the weight is read once for both
        norm, broken = torch.ones((), device=trainer.device), torch.zeros((), dtype=torch.bool, device=trainer.device)
        return [Part("optimiser and average", 1, 18 * num, 36 * num,
                     call=lambda: one_pass.step(norm, broken, [1 - decay] * len(one_pass.averages)))]
    # AdamW reads weight, gradient and both moments and writes all but the gradient: 28 bytes
    return [Part("optimiser", 1, 15 * num, 28 * num, call=trainer.optimizer.step),
            Part("average", 1, 3 * num, 12 * num, call=lambda: trainer.ema.update(trainer.model, decay))]


def attention_costs(config: ModelConfig, batch: int, backward: bool = True) -> tuple[float, float]:
    """Return (operations, bytes) of attention with its two linear maps, forward and, if asked for, backward."""
    tokens, width = batch * config.num_tokens, config.hidden_size
    flops = tokens * (8 * width**2 + 4 * config.num_tokens * width)
    # x, qkv out and in, mixed out and in, y: 10 S D of bf16; weights 4 D^2 read as bf16
    moved = 2 * (10 * tokens * width + 4 * width**2)
    passes = 3 if backward else 1
    return passes * flops, passes * moved


def feed_forward_costs(width: int, hidden: int, rows: int, num_experts: int,
                       backward: bool = True) -> tuple[float, float]:
    """Return (operations, bytes) of `rows` tokens through feed-forward networks, forward and, if asked for, backward.

    Experts also gather their rows and add them up by token; the gathered copy need not exist, so it is not counted.
    """
    weights = 2 * num_experts * width * hidden
    tokens = 2 * rows * (2 * width + 2 * hidden)
    flops = 4.0 * rows * width * hidden
    if not backward:
        return flops, tokens + 2 * weights
    # weights: read as bf16 forward and backward, gradient written as float32
    return 3 * flops, 3 * tokens + (2 + 2 + 4) * weights


def routing_costs(router: nn.Module, config: ModelConfig, batch: int, backward: bool = True) -> tuple[float, float]:
    """Return (operations, bytes) of a router's linear maps, forward and, if asked for, backward, in float32."""
    tokens, width = batch * config.num_tokens, config.hidden_size
    matrices = sum(module.weight.numel() for module in router.modules() if isinstance(module, nn.Linear))
    wide = sum(module.out_features for module in router.modules() if isinstance(module, nn.Linear))
    # tokens are bf16, what becomes of them float32: in forward, in and out again backward
    passes = 3 if backward else 1
    return passes * 2.0 * tokens * matrices, passes * tokens * (2 * width + 4 * wide)


def ends_costs(config: ModelConfig, batch: int, backward: bool = True) -> tuple[float, float]:
    """Return (operations, bytes) of what is before and behind the blocks, forward and, if asked for, backward."""
    tokens, width, area = batch * config.num_tokens, config.hidden_size, config.patch_size**2
    values = area * (config.in_channels + config.out_channels)
    matrices = width * (2 * NUM_FREQUENCIES + 3 * width)  # of times, and the modulation of the last norm
    # tokens out, residual and branch in, their norm out and in again; images and patches in float32
    passes = 3 if backward else 1
    return passes * 2.0 * (tokens * width * values + batch * matrices), passes * tokens * (14 * width + 4 * values)


def modulation_costs(config: ModelConfig, batch: int, backward: bool = True) -> tuple[float, float]:
    """Return (operations, bytes) of a block without attention and feed-forward: adaLN, two norms, two residuals."""
    tokens, width = batch * config.num_tokens, config.hidden_size
    flops = 12.0 * batch * width**2 + 2 * 12 * tokens * width
    # twice, residual and branch in (6), out again and modulated (6); backward residual and branch, gradients of
    # residual and modulated in (12), of residual and branch out (6); adaLN's weights as those of a feed-forward
    moved, weights = 2 * 12 * tokens * width, 6 * width**2
    if not backward:
        return flops, moved + 2 * weights
    return 3 * flops, moved + 2 * 18 * tokens * width + (2 + 2 + 4) * weights


def _layer_inputs(source: Source) -> dict[str, Any]:
    """Return what a forward hands to attention, feed-forward and mixture layers and to a block, and experts' `rows`."""
    seen: dict[str, Any] = {}

    def keep(name: str) -> Callable:
        return lambda module, inputs: seen.setdefault(name, inputs)

    model = source.network
    moe = model.moe_layers()
    watched: dict[str, nn.Module] = {"attention": model.blocks[-1].attn, "block": model.blocks[-1],
                                     "final": model.final}
    dense = [block.ffn for index, block in enumerate(model.blocks) if index not in moe]
    watched |= {"dense": dense[0]} if dense else {}
    watched |= {"moe": next(iter(moe.values()))} if moe else {}
    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in watched.items()]
    try:
        # eager, for compiled blocks of a kind share their code, and with it the hooks of one of them
        with (torch.compiler.set_stance("force_eager"), torch.no_grad(),
              autocast(source.config.training, source.device)):
            routings = model(*source.inputs, source.row_bound).routings
    finally:
        for hook in hooks:
            hook.remove()
    if routings:  # of an average layer
        seen["rows"] = sum(int(each.counts(source.config.model.moe.num_experts).sum()) for each in routings) // len(moe)
    return pytree.tree_map_only(Tensor, lambda value: value.detach().clone().requires_grad_(source.backward), seen)


def _alone(module: nn.Module, inputs: tuple) -> tuple[Forward, list[Tensor]]:
    return lambda: module(inputs[0]), [inputs[0], *module.parameters()]


def _ends(source: Source, inputs: tuple) -> tuple[Forward, list[Tensor]]:
    network = source.network
    ends = (network.patch_embed, network.time_embed, network.label_embed, network.final)
    leaves = [*_tensors(inputs), *(weight for module in ends for weight in module.parameters())]
    return lambda: [*network.embed(*source.inputs), network.final(*inputs)], leaves


def _without_inner(block: Block, inputs: tuple) -> tuple[Forward, list[Tensor]]:
    bare = copy.deepcopy(block)
    bare.attn, bare.ffn, bare.is_moe = nn.Identity(), nn.Identity(), False
    return lambda: bare(*inputs)[0], [*_tensors(inputs), *bare.parameters()]


def _routing(layer: MoE, inputs: tuple, row_bound: float | None) -> tuple[Forward, list[Tensor]]:
    def forward() -> list[Any]:
        routing = layer.route(inputs[0].to(product_dtype(inputs[0])), row_bound)
        return [getattr(routing, each.name) for each in fields(routing)]  # else the compiler leaves out what nobody has

    return forward, [inputs[0], *layer.router.parameters()]


def _experts(layer: MoE, inputs: tuple, row_bound: float | None) -> tuple[Forward, list[Tensor]]:
    with torch.no_grad():
        routing = layer.route(inputs[0], row_bound)
    x_SD = inputs[0].detach().flatten(0, 1).requires_grad_(inputs[0].requires_grad)
    routing.gate_N.requires_grad_(inputs[0].requires_grad)
    return lambda: layer.experts(x_SD, routing), [x_SD, routing.gate_N, *layer.experts.parameters()]


def _prepare(part: Part, source: Source) -> tuple[Callable[[], Any], str]:
    """Return a call that goes through a part, forward and as the source says backward or again, and how it runs."""
    forward, leaves = part.work()
    runtime = source.config.runtime
    is_compiled = runtime.compile and part.is_compiled
    compiled = torch.compile(forward) if is_compiled else forward
    with torch.set_grad_enabled(source.backward), autocast(source.config.training, source.device):
        whole, outputs = len(_tensors(forward())), compiled()
    gradients = [torch.randn_like(output) for output in _differentiable(outputs)]
    if len(_tensors(outputs)) < whole or bool(gradients) != source.backward:
        raise RuntimeError(f"{part.name}: what was compiled is not all of it")
    del outputs  # and what was kept for its backward

    def call() -> None:
        with torch.set_grad_enabled(source.backward), autocast(source.config.training, source.device):
            for _ in range(source.repeats):
                outputs = _differentiable(compiled())
        if gradients:
            torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)  # never touches a trainer's `.grad`

    how = "compiled" if is_compiled else "eager"
    if not runtime.compile or source.device.type != "cuda":
        return call, how
    graphed = Graphed(call)
    for _ in range(EAGER_CALLS + 1):
        graphed()
    return graphed, f"{how}, as a graph"


def _differentiable(outputs: Any) -> list[Tensor]:
    return [output for output in _tensors(outputs) if output.requires_grad]


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]
