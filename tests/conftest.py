"""Builders that the tests share: small configurations of every router, random weights, the golden files."""

from __future__ import annotations

import copy
import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffmoe.config import ModelConfig, RunConfig, from_dict, resolve_router
from diffmoe.models.dit import DiT, build_model
from diffmoe.models.kernels import HAS_TRITON
from diffmoe.moe.routing import Router

os.environ.pop("MLFLOW_TRACKING_URI", None)  # the tester's own; a test that tracks names its store
pytest.register_assert_rewrite("processes")  # so that it says what differs
torch.set_num_threads(1)  # one result on every machine; with more, small operators wait for one another


needs_interpreter = pytest.mark.skipif(
    not HAS_TRITON or torch.__version__ < torch.torch_version.TorchVersion("2.14"),
    reason="needs Triton, and a torch that calls interpreted kernels (2.14 does, 2.11 does not)")

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_FILES = sorted(GOLDEN.glob("*.npz"))
MODEL_FILES = [path for path in GOLDEN_FILES if not path.stem.startswith(("ema", "samplers"))]

TOKEN_CHOICE, EXPERT_RACE = "baselines.token_choice:TokenChoice", "baselines.expert_race:ExpertRace"
ROUTERS: dict[str, dict[str, Any]] = {
    "diffmoe": {"kind": "expert_choice"},
    "diffmoe_predictor": {"kind": "expert_choice", "selection": "predictor"},
    "diffmoe_static": {"kind": "expert_choice", "inference": "static"},
    "ec": {"kind": "expert_choice", "pool": "sample", "predictor": False, "inference": "static"},
    "ec_dynamic": {"kind": "expert_choice", "pool": "sample"},
    "ec_predictor": {"kind": "expert_choice", "pool": "sample", "selection": "predictor"},
    "tc": {"kind": TOKEN_CHOICE},
    "race": {"kind": EXPERT_RACE},
}
DYNAMIC_ROUTERS = ("diffmoe", "diffmoe_predictor", "ec_dynamic", "ec_predictor", "race")


def model_data(router: str | dict | None = "diffmoe", *, num_experts: int = 4, capacity: float = 1.0,
               shared_experts: int = 0, interleave: bool = True, expert_ratio: float | None = None,
               **changes: Any) -> dict[str, Any]:
    """Return a small model's configuration as YAML data; `router` is a name in ROUTERS, options, or None for dense."""
    moe = router and {"router": copy.deepcopy(ROUTERS[router] if isinstance(router, str) else router),
                      "num_experts": num_experts, "capacity": capacity, "shared_experts": shared_experts,
                      "interleave": interleave, "expert_ratio": expert_ratio}
    return {"hidden_size": 32, "depth": 4, "num_heads": 4, "input_size": 8, "patch_size": 2, "in_channels": 3,
            "num_classes": 10, "moe": moe} | changes


def model_config(router: str | dict | None = "diffmoe", **changes: Any) -> ModelConfig:
    """Build the configuration of `model_data`."""
    return from_dict(ModelConfig, model_data(router, **changes))


def run_data(changes: dict[str, Any] | None = None, router: str | dict | None = "diffmoe") -> dict[str, Any]:
    """Return a run's configuration as YAML data, with `changes` by dotted key."""
    data = {"model": model_data(router), "data": {"name": "digits"}, "training": {"batch_size": 4, "num_images": 40}}
    for key, value in (changes or {}).items():
        *parents, last = key.split(".")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = copy.deepcopy(value)
    return data


def run_config(changes: dict[str, Any] | None = None, router: str | dict | None = "diffmoe") -> RunConfig:
    """Build the configuration of `run_data`."""
    return from_dict(RunConfig, run_data(changes, router))


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw N(0, 1) from `seed` alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter from (seed, its name): matrices of gain 1, vectors N(0, 0.3); returns the module."""
    for name, parameter in module.named_parameters():
        # packed experts are (E, in, out), everything else is (out, in...)
        fan_in = parameter.shape[1] if parameter.dim() == 3 else parameter[0].numel()
        std = fan_in**-0.5 if parameter.dim() > 1 else 0.3
        with torch.no_grad():
            parameter.copy_(std * rand(*parameter.shape, seed=zlib.crc32(f"{seed}:{name}".encode())))
    return module


def random_model(router: str | dict | None = "diffmoe", seed: int = 0, **changes: Any) -> DiT:
    """Build a model whose every parameter is random and whose thresholds select some pairs, not all."""
    model = randomise(build_model(model_config(router, **changes)), seed)
    for layer in model.moe_layers().values():
        set_threshold(layer.router)
    return model


def random_router(router: str | dict, **changes: Any) -> Router:
    """Build a router by itself, with random weights and thresholds."""
    config = model_config(router, **changes)
    return set_threshold(randomise(resolve_router(config.moe.router.kind)(config, config.moe)))


def set_threshold(router: Router) -> Router:
    """Set a dynamic router's threshold to where some pairs pass; each expert has its own. Returns the router."""
    if hasattr(router, "threshold"):
        centre = 0.5 if hasattr(router, "predictor") else 0.6
        router.threshold.copy_(centre + 0.05 * torch.linspace(-1, 1, router.threshold.numel()))
    return router


def network_inputs(batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, times and labels for the model of `model_data`."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch_size, 3, 8, 8, generator=generator), torch.rand(batch_size, generator=generator),
            torch.randint(11, (batch_size,), generator=generator))


def one_line(error: BaseException) -> str:
    """Return the message, which must be a single line."""
    message = str(error)
    assert message and "\n" not in message, repr(message)
    return message


@pytest.fixture(autouse=True)
def leaves_no_process_group() -> Iterator[None]:
    """Find the test that left one, rather than whichever comes next in its process and joins another."""
    yield
    assert not torch.distributed.is_initialized()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Return a test's own generator; the soak sets another seed each round."""
    return random.Random(f"{os.environ.get('FAULT_SEED', '0')} {request.node.name}")


@pytest.fixture
def unset_memory_is_nan() -> Iterator[None]:
    """Fill memory that an operator leaves unset with NaN, so that a result that reads it shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave two figures of a report: drawing all of them takes seconds."""
    from diffmoe.report.figures import FIGURES  # most tests need no seaborn

    for name in FIGURES.keys() - {"distance_vs_cost", "capacity_by_call"}:
        monkeypatch.delitem(FIGURES, name)
