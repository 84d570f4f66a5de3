"""What a trained network does inside: gates, branches, load, what a threshold gets of the training's choice, gradients.

Measured on one training batch, of which every image meets `NUM_LEVELS` noise levels, twice:

    inference rule   a call has one noise level, as in sampling: loss, gates, branches, capacity
    training rule    a call has all levels mixed, as in training: load, and what the threshold gets of it.
                     In pools of one level a fixed count would be the same at each, whatever the experts prefer.

Numbers have four significant digits, losses six; None is a mean over nothing.
Shapes: K noise levels, L mixture-of-experts layers, E experts, N images times K; the others as in moe/routing.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffmoe.config import ModelConfig, RunConfig
from diffmoe.data import TrainingData
from diffmoe.evaluation.calibration import calibration_batches, trainer_of
from diffmoe.evaluation.sampling import prepare_call
from diffmoe.models.dit import DiT
from diffmoe.moe.routing import Router, Routing
from diffmoe.training.precision import tf32
from diffmoe.training.trainer import Batch, Trainer

NUM_LEVELS = 10
MOST_CLASSES = 20
"""With more classes a batch has too few images of each to say who works on them."""
Seen = dict[str, Tensor]
"""Of each image and level, float64 (N, ...) by name: `level`, `label`, `loss`; `squares` (N, depth, 3), summed over an
image, of the stream, of what a block adds to it, and of its feed-forward layer's output; for mixtures `pairs`
(N, L, E), `weight` (N, L), the sum of the pairs' weights, and with a threshold `passed` and `hits` (N, L), the pairs
that pass it, and those of them that are taken."""


def diagnose(model: DiT, config: RunConfig, seed: int, data: TrainingData) -> dict[str, Any]:
    """Look into a trained network; it and the state of random numbers stay as they are.

    Args:
        model: the averaged network, on the device to use.
        config: of the run, with the inference options to look at.
        seed: of the run; the batch is one that neither training nor calibration has drawn.
        data: what it was trained on.

    Returns:
        `images`, `batch`, the number of the step whose they would be, and `noise_levels` [K] as shares of the process's
            time, falling from pure noise (1); `loss` [K], the squared error of the network's output;
        `blocks`: `is_moe` [depth], `rms` [depth][K] of the feed-forward layer's output, and `share` [depth][K], the RMS
            of what the block adds of it (behind adaLN's gate) over that of the stream that it is added to;
        `gradients` and `weights`: norms by part, the gradient that of the batch's training loss;
        for mixtures `mixed_loss` [K], the loss by the training rule; `gates`: `pair` [L][K], the mean weight of a pair,
            and `token` [L][K], the mean over tokens of the sum of their weights; `capacity` [L][K]; by the training
            rule `load_by_level` [L][E][K] and, of few classes, `load_by_class` [L][E][classes], pairs a token;
        with a threshold `thresholds` [L][E or 1] and `passes`: `precision` and `recall` [L][K] of the pairs that pass
            it, each for itself, against those that the training rule takes.
    """
    device = model.positions.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # building a network draws
        trainer = trainer_of(model, config, seed, data)
        number = config.training.num_steps + calibration_batches(config)
        batch = trainer.batch(number)
        inference, training = (_observe(trainer, batch, training=training) for training in (False, True))
        norms = _norms(trainer, batch)
    levels = 1 - (torch.arange(NUM_LEVELS, dtype=torch.float64) + 0.5) / NUM_LEVELS
    loss = _by_level(inference, "loss") / len(batch.images)
    found = {"images": len(batch.images), "batch": number, "noise_levels": _short(levels), "loss": _short(loss, 6),
             "blocks": _blocks(model, inference)} | norms
    if config.model.moe is None:
        return found
    routers = [layer.router for layer in model.moe_layers().values()]
    found["mixed_loss"] = _short(_by_level(training, "loss") / len(batch.images), 6)
    return found | _gates(inference, config.model) | _load(training, config.model) | _thresholds(training, routers)


@torch.no_grad()
def _observe(trainer: Trainer, batch: Batch, *, training: bool) -> Seen:
    """Call the network by one of the two rules until each image has met each noise level; return what was seen."""
    config, model, process = trainer.config, trainer.model.train(training), trainer.process
    call = prepare_call(model, config, None, compiled=False)
    times = process.even_times(NUM_LEVELS).to(trainer.device)
    image = torch.arange(len(batch.images), device=trainer.device)
    num_parts = -(-len(image) // (trainer.micro_batch if training else config.sampling.batch_size))
    seen: list[Seen] = []
    with _watched(model) as (squares, passes):
        for turn in range(NUM_LEVELS):
            level = (image + turn) % NUM_LEVELS if training else torch.full_like(image, turn)
            for rows in image.chunk(num_parts):
                part, t = batch.rows(rows), times[level[rows]]
                output = call(process.add_noise(part.images, part.noise, t), t, part.labels)
                prediction = output.prediction.to(trainer.dtype)
                loss = process.loss(lambda x, t, known=prediction: known, part.images, part.noise, t)["mse"]
                found = {"level": level[rows], "label": part.labels, "loss": loss, "squares": torch.stack(squares, 1)}
                if output.routings:
                    found |= _of_pairs(output.routings, passes, len(rows), config.model)
                seen.append({name: value.double().cpu() for name, value in found.items()})
                squares.clear()
                passes.clear()
    return {name: torch.cat([found[name] for found in seen]) for name in seen[0]}


@contextlib.contextmanager
def _watched(model: DiT) -> Iterator[tuple[list[Tensor], list[Tensor | None]]]:
    """Fill two lists in order of depth: `squares` (B, 3) of each block, and `Router.passes` of each router."""
    squares: list[Tensor] = []
    passes: list[Tensor | None] = []

    def see_block(block: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x_BTD, gate_BD, y_BTD = output[0]
        y_BTD = y_BTD.float()
        parts = x_BTD.float(), gate_BD[:, None] * y_BTD, y_BTD
        squares.append(torch.stack([part.square().sum((1, 2)) for part in parts], 1))

    def see_router(router: Router, inputs: tuple[Any, ...], output: Routing) -> None:
        passes.append(router.passes(inputs[0]))

    hooks = [block.register_forward_hook(see_block) for block in model.blocks]
    hooks += [layer.router.register_forward_hook(see_router) for layer in model.moe_layers().values()]
    try:
        yield squares, passes
    finally:
        for hook in hooks:
            hook.remove()


def _of_pairs(routings: list[Routing], passes: list[Tensor | None], num_images: int, config: ModelConfig) -> Seen:
    """Return what is seen of the pairs of a call, for each of its images."""
    tokens, experts = config.num_tokens, config.moe.num_experts
    shape = len(routings), num_images, tokens, experts
    mask_LBTE = torch.stack([routing.mask(num_images * tokens, experts) for routing in routings]).view(shape)
    found = {"pairs": mask_LBTE.sum(2).transpose(0, 1), "weight": torch.stack([
        torch.zeros(num_images, dtype=torch.float64, device=routing.gate_N.device).index_add_(
            0, routing.token_N // tokens, routing.gate_N.double()) for routing in routings], 1)}
    if all(passed is not None for passed in passes):
        passes_LBTE = torch.stack(passes).view(shape)
        found |= {"passed": passes_LBTE.sum((2, 3)).t(), "hits": (passes_LBTE & mask_LBTE).sum((2, 3)).t()}
    return found


def _blocks(model: DiT, seen: Seen) -> dict[str, Any]:
    stream, added, output = _by_level(seen, "squares").unbind(-1)  # (K, depth)
    numbers = len(seen["level"]) / NUM_LEVELS * model.config.num_tokens * model.config.hidden_size
    return {"is_moe": [block.is_moe for block in model.blocks], "rms": _short((output / numbers).sqrt().t()),
            "share": _short((added / stream).sqrt().t())}


def _gates(seen: Seen, config: ModelConfig) -> dict[str, Any]:
    tokens = len(seen["level"]) / NUM_LEVELS * config.num_tokens
    pairs_KL, weight_KL = _by_level(seen, "pairs").sum(-1), _by_level(seen, "weight")
    return {"gates": {"pair": _short((weight_KL / pairs_KL).t()), "token": _short((weight_KL / tokens).t())},
            "capacity": _short((pairs_KL / tokens).t())}


def _load(seen: Seen, config: ModelConfig) -> dict[str, Any]:
    tokens = len(seen["level"]) / NUM_LEVELS * config.num_tokens
    found = {"load_by_level": _short((_by_level(seen, "pairs") / tokens).permute(1, 2, 0))}
    if config.num_classes > MOST_CLASSES:
        return found
    size = config.num_classes + 1  # the last one is no class
    images = _sums(torch.ones_like(seen["label"]), seen["label"], size)
    load = _sums(seen["pairs"], seen["label"], size) / (images * config.num_tokens)[:, None, None]
    return found | {"load_by_class": _short(load[:config.num_classes].permute(1, 2, 0))}


def _thresholds(seen: Seen, routers: list[Router]) -> dict[str, Any]:
    if "passed" not in seen:
        return {}
    hits, passed, taken = _by_level(seen, "hits"), _by_level(seen, "passed"), _by_level(seen, "pairs").sum(-1)
    found = {"passes": {"precision": _short((hits / passed).t()), "recall": _short((hits / taken).t())}}
    if all(hasattr(router, "threshold") for router in routers):
        found["thresholds"] = [_short(router.threshold) for router in routers]
    return found


def _norms(trainer: Trainer, batch: Batch) -> dict[str, Any]:
    """Return the norms of the gradient and of the weights of each part."""
    trainer.model.train()
    with tf32(trainer.config.training.tf32):
        trainer.gradients(batch.images, batch.labels, batch.noise, batch.times)
    predictors = {id(parameter) for parameter in trainer.model.predictor_parameters()}
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trainer.model.named_parameters():
        parts.setdefault("predictor" if id(parameter) in predictors else _part(name), []).append(parameter)
    norms = {"gradients": {}, "weights": {}}
    for part, parameters in parts.items():
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for name, tensors in (("gradients", gradients), ("weights", parameters)):
            each = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64) for tensor in tensors]
            norms[name][part] = _short(torch.stack(each).norm()) if each else None
    return norms


def _part(name: str) -> str:
    """Name the part of the network that a parameter belongs to; shared experts are feed-forward layers."""
    first, *inner = name.split(".")
    if first != "blocks":
        return "final" if first == "final" else "embedding"
    if inner[1] == "ffn":
        return inner[2] if inner[2] in ("router", "experts") else "ffn"
    return {"attn": "attention", "adaln": "adaln"}[inner[1]]


def _by_level(seen: Seen, name: str) -> Tensor:
    return _sums(seen[name], seen["level"], NUM_LEVELS)


def _sums(values: Tensor, group_N: Tensor, size: int) -> Tensor:
    """Add up `values` (N, ...) by group, (size, ...)."""
    return values.new_zeros(size, *values.shape[1:]).index_add_(0, group_N.long(), values)


def _short(values: Tensor, digits: int = 4) -> Any:
    """Return nested lists of numbers that are short in a file."""
    if values.dim():
        return [_short(value, digits) for value in values]
    number = values.item()
    return float(f"{number:.{digits}g}") if math.isfinite(number) else None
