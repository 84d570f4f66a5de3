"""A cell is a row of a table with one seed: list the missing ones and run them under a time budget.

The table, the campaign and the sweeps call this. A cell trains (or finds the checkpoint that its row shares with
others), samples, measures, and writes one record. What is recorded is done; what was interrupted goes on.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from diffmoe.config import ConfigError, EvaluationConfig, RunConfig, digest, load_config, require, shareable
from diffmoe.data import ImageData, TrainingData
from diffmoe.evaluation.adm import measure_adm, read_reference
from diffmoe.evaluation.calibration import calibrate_thresholds
from diffmoe.evaluation.classifiers import CLASSIFIERS, DIGITS, classify
from diffmoe.evaluation.diagnosis import diagnose
from diffmoe.evaluation.extractors import INCEPTION, distance_name, weights_file
from diffmoe.evaluation.grid import examples, save_class_grid
from diffmoe.evaluation.metrics import check_counts, frechet_distance, measure, sampling_floor
from diffmoe.evaluation.sampling import Samples, compile_ahead
from diffmoe.evaluation.together import sample_together
from diffmoe.launch import train_together
from diffmoe.models.counting import count_parameters, flops_per_call
from diffmoe.models.dit import DiT
from diffmoe.records import Record, environment, read_records, write_record
from diffmoe.training.graph import release_memory
from diffmoe.training.run import Progress, Turn, is_trained, train_run

log = logging.getLogger(__name__)
SWEEP_THRESHOLDS = (0.9, 0.7, 0.5, 0.3, 0.1, 1e-2, 1e-3)
"""Global thresholds of the paper's interval search that span a capacity from 0.7 to 2.3 there."""
SWEEP_DOUBLINGS = 3
"""Of the rows laid out for a router: the lowest threshold lets 5 pairs a token pass on CIFAR-10, more at much noise."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: a system with its training and inference settings."""

    key: str
    label: str
    system: str
    config: RunConfig
    threshold_sweep: bool = False
    """Also sample with one global threshold, several times, from each seed's checkpoint."""


@dataclass(frozen=True)
class Cell:
    """One row with one seed."""

    row: Row
    seed: int

    @property
    def name(self) -> str:
        """Name the cell to a reader."""
        return f"{self.row.label}, seed {self.seed}"

    @functools.cached_property
    def training(self) -> tuple[str, int]:
        """Name the training run that the cell shares with others."""
        return digest(self.row.config, scope="training"), self.seed

    def record_id(self, data: TrainingData) -> str:
        """Name the record that this cell writes."""
        return f"{self.row.key}-{digest(self.row.config)}-s{self.seed}-{data.digest}"


@dataclass(frozen=True)
class Store:
    """Where a user's runs and records lie: `results/<scale>/local`."""

    folder: Path

    @property
    def records(self) -> Path:
        """The folder of records."""
        return self.folder / "records"

    @property
    def cache(self) -> Path:
        """The folder of what is computed of the reference once: its features, its floors."""
        return self.folder / "cache"

    def run_folder(self, cell: Cell, data: TrainingData) -> Path:
        """The folder of a cell's training run."""
        return self.folder / "runs" / _run_name(*cell.training, data.digest)

    def is_trained(self, cell: Cell, data: TrainingData) -> bool:
        """Say whether the network that a cell measures is there."""
        return is_trained(cell.row.config, self.run_folder(cell, data))

    def has(self, cell: Cell, data: TrainingData) -> bool:
        """Say whether a cell is recorded."""
        return (self.records / f"{cell.record_id(data)}.json").exists()

    def publish(self, folder: Path) -> list[Record]:
        """Copy the records that `folder`/records lacks and return them; what is there stays as it is.

        Raises:
            ConfigError: when there is none to copy.
        """
        records = read_records(self.records)
        if not records:
            raise ConfigError(f"{self.records}: no record to publish; run the cells first")
        target = folder / "records"
        target.mkdir(parents=True, exist_ok=True)
        new = [record for record in records if not (target / f"{record.id}.json").exists()]
        for record in new:
            shutil.copy2(self.records / f"{record.id}.json", target)
        print(f"published {len(new)} records to {folder}; {len(records) - len(new)} were there and stay as they are")
        return new


def run_name(record: Record) -> str:
    """Name the folder of the training run that a record was measured from."""
    return _run_name(record.training_digest, record.seed, record.data["digest"])


def _run_name(training_digest: str, seed: int, data_digest: str) -> str:
    return f"{training_digest}-s{seed}-{data_digest}"  # shared by all cells of equal training settings and seed


def load_rows(path: Path, scale: Path, overrides: Sequence[str] = ()) -> list[Row]:
    """Read a file of rows and lay each over the scale's configuration, then the overrides.

    `larger: true` takes the scale's `<scale>-larger.yaml` too; `set` changes settings, `at: {<scale>: ...}` at one
    scale alone; `vary: {key: [values]}` makes a row of each value.

    Raises:
        ConfigError: for a file or a row that cannot be used.
    """
    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    rows = []
    for entry in entries:
        larger = [scale.with_name(f"{scale.stem}-larger.yaml")] if entry.get("larger") else []
        files = [scale, *larger, path.parent / entry["config"]]
        changes = entry.get("set", {}) | entry.get("at", {}).get(scale.stem, {})
        for suffix, varied in _variants(entry.get("vary", {})):
            config = load_config(files, [*_assignments(changes | varied), *overrides])
            rows.append(Row(key="-".join([entry["row"], *suffix]), label=", ".join([entry["label"], *suffix]),
                            system=entry["system"], config=config, threshold_sweep=entry.get("threshold_sweep", False)))
            router = config.model.moe and config.model.moe.router
            follows = getattr(router, "inference", None) == "dynamic" and router.global_threshold is None
            require(follows or not rows[-1].threshold_sweep, f"{path}: threshold_sweep", rows[-1].key,
                    "sweep a row whose router decides by its own thresholds")
    return rows


def _variants(vary: dict[str, list[Any]]) -> list[tuple[list[str], dict[str, Any]]]:
    """Return the end of a row's name with its settings, for each value of one key; without a key the row itself."""
    if not vary:
        return [([], {})]
    ((key, values),) = vary.items()
    return [([f"{value:g}" if isinstance(value, float) else str(value)], {key: value}) for value in values]


def _assignments(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={yaml.safe_dump(value).removesuffix('...').strip()}" for key, value in settings.items()]


def at_budgets(rows: Sequence[Row]) -> list[Row]:
    """Return each row once for each of its `training.budgets`, and for the whole run."""
    return [replace(row, config=replace(row.config, evaluation=replace(row.config.evaluation, budget_images=budget)))
            for row in rows for budget in (*row.config.training.budgets, None)]


def missing_cells(rows: Sequence[Row], seeds: Sequence[int], data: TrainingData, store: Store) -> list[Cell]:
    """Return the cells without a record: the smallest budget first, then seed by seed, then in the rows' order."""
    cells = [cell for seed in seeds for cell in (Cell(row, seed) for row in rows) if not store.has(cell, data)]
    return sorted(cells, key=lambda cell: cell.row.config.images_seen)


def check_cells(cells: Sequence[Cell], data: TrainingData) -> None:
    """Find before any work what would stop a cell after its training.

    Raises:
        ConfigError: for samples that cannot be measured.
    """
    for evaluation in {cell.row.config.evaluation for cell in cells}:
        check_evaluation(evaluation, data)


def reference_images(evaluation: EvaluationConfig, data: TrainingData | None) -> Tensor:
    """Return the images that samples are compared with, uint8 (N, C, H, W): ADM's, or those of the training.

    Raises:
        ConfigError: when there are none.
    """
    if evaluation.reference is not None:
        require(evaluation.extractor == INCEPTION, "evaluation.extractor", evaluation.extractor,
                f"evaluation.reference is measured with {INCEPTION}")
        return read_reference(Path(evaluation.reference)).images
    require(isinstance(data, ImageData), "evaluation.reference", None,
            "latents are no images to compare with; give ADM's reference batch (.npz)")
    return data.images


def reference_digest(evaluation: EvaluationConfig, data: TrainingData | None) -> str:
    """Return 12 hex digits that name the images of `reference_images`."""
    return read_reference(Path(evaluation.reference)).digest if evaluation.reference else data.digest


def check_evaluation(evaluation: EvaluationConfig, data: TrainingData | None) -> None:
    """Find before any work what would stop `measure_samples`.

    Raises:
        ConfigError: for samples that cannot be measured.
    """
    images = reference_images(evaluation, data)
    check_counts(evaluation.num_samples, len(images), evaluation.kid_subset_size)
    require(evaluation.reference is None or evaluation.second_extractor is None, "evaluation.second_extractor",
            evaluation.second_extractor, f"evaluation.reference is measured with {INCEPTION} alone; use null")
    require(evaluation.reference is None or not evaluation.memorisation, "evaluation.memorisation", True,
            "samples are compared with the training images, not with evaluation.reference; use false")
    weights_file(evaluation.extractor, _weights(evaluation))
    if evaluation.second_extractor is not None:
        weights_file(evaluation.second_extractor)
    for extractor in {evaluation.extractor, evaluation.second_extractor} & CLASSIFIERS.keys():
        CLASSIFIERS[extractor].check((3, *images.shape[2:]))  # grey images come repeated


def group_by_training(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Put cells that share a training run together, in the order of each group's first cell."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.training, []).append(cell)
    return list(groups.values())


@contextmanager
def gpu_turn(folder: Path, device: torch.device) -> Iterator[None]:
    """Wait until no other process of `folder` holds the GPU, and hold it; a CPU is nobody's alone.

    Trainings that share a GPU take as long as one after another, and their times say nothing. What dies lets go.
    """
    if device.type != "cuda":
        yield
        return
    with (folder / f"gpu-{torch.cuda.get_device_properties(device).uuid}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing it is not enough where a child has it too


def run_cell(cell: Cell, scale: str, data: TrainingData, store: Store, device: torch.device, *,
             processes: int = 1, deadline: float = math.inf, turn: Turn = nullcontext,
             progress: Progress = lambda step, losses: None) -> Record:
    """Train, sample and measure one cell; write and return its record.

    Args:
        scale: name of the scale, for the record.
        processes: that train and sample; with more than one in processes of their own.
        deadline: value of `time.monotonic()` at which training saves itself and stops.
        turn: taken once, as `gpu_turn` does, and held while the network trains, samples and is looked into; compiling
            and measuring may overlap with other cells' work.
        progress: told of training as it goes.

    Raises:
        ConfigError, Interrupted: as `train_run` does.
    """
    config = cell.row.config
    folder = store.run_folder(cell, data)
    if processes > 1 and not is_trained(config, folder):
        train_together(config, cell.seed, folder, processes, deadline)
    compile_ahead(config, device, doublings=SWEEP_DOUBLINGS if cell.row.threshold_sweep else 1)
    release_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with ExitStack() as held:
        # One turn from training's first steps on: given up between, it comes back after other cells' whole trainings.
        take_turn = functools.cache(lambda: nullcontext(held.enter_context(turn())))
        run = train_run(config, cell.seed, data, folder, device, deadline=deadline, turn=take_turn, progress=progress)
        release_memory(device)
        average = run.load_average(config, device)
        take_turn()
        model = calibrate_thresholds(average, config, cell.seed, data)
        started = time.perf_counter()
        samples = sample_together(model, config, range(config.evaluation.num_samples), processes, folder)
        sampling_s = time.perf_counter() - started
        described = environment(device)  # first: steps that are not compiled hold another memory than the row's
        diagnosis = _diagnosis(cell, model, data)
        drawn = _draw_sweep(model, config, processes, folder) if cell.row.threshold_sweep else []
    del average, model
    release_memory(device)
    grids = store.folder / "samples"
    grids.mkdir(exist_ok=True)
    budget = f"-at-{config.images_seen}" if config.training.budgets else ""
    save_class_grid(grids / f"{cell.row.key}{budget}-s{cell.seed}.png", samples.images, samples.labels)
    started = time.perf_counter()
    metrics = measure_samples(samples, config, data, store.cache, device)
    evaluation_s = time.perf_counter() - started
    sweep = [_sweep_point(point, config, data, store.cache, device) for point in drawn]
    record = Record(
        id=cell.record_id(data), scale=scale, row=cell.row.key, label=cell.row.label, system=cell.row.system,
        seed=cell.seed, config=shareable(config), config_digest=digest(config),
        training_digest=cell.training[0],
        data={"name": data.name, "digest": data.digest, "num_images": len(data)},
        training={"steps": run.description["step"], "images": run.description["step"] * config.training.batch_size,
                  "seconds": run.description["seconds"], "images_per_second": run.images_per_second(),
                  "processes": run.description.get("processes", 1), "losses": run.losses()},
        sampling={"num_samples": len(samples.images), "seconds": sampling_s, "processes": processes},
        evaluation={"extractor": config.evaluation.extractor, "seconds": evaluation_s,
                    "reference": reference_digest(config.evaluation, data),
                    "distance_name": distance_name(config.evaluation.extractor),
                    "floor": sampling_floors(config.evaluation, data, store.cache, device)},
        metrics=metrics, activation=activation(config, samples), threshold_sweep=sweep,
        examples=examples(samples.images, samples.labels, samples.token_load), diagnosis=diagnosis,
        environment=described)
    write_record(store.records, record)
    return record


def _diagnosis(cell: Cell, model: DiT, data: TrainingData) -> dict[str, Any]:
    """Return what `diagnose` does; nothing where its batch does not fit, rather than lose what was measured."""
    try:
        return diagnose(model, cell.row.config, cell.seed, data)
    except torch.OutOfMemoryError:
        log.warning("%s: a training batch does not fit uncompiled, so its record has no diagnosis; "
                    "runtime.micro_batch_size makes it smaller", cell.name)
        return {}


def activation(config: RunConfig, samples: Samples) -> dict[str, Any]:
    """Return what was activated, measured over all calls: capacity, both parameter counts, GFLOPs a call."""
    capacity = 1.0 if samples.capacity is None else samples.capacity.mean().item()
    count = count_parameters(config.model)
    found = {"capacity": capacity, "total_params": count.total, "activated_params": count.activated_paper(capacity),
             "activated_params_strict": count.activated_strict(capacity),
             "gflops": flops_per_call(config.model, capacity) / 1e9}
    if samples.capacity is None:
        return found
    by_class = [samples.capacity[:, samples.labels == label].mean().item() for label in range(config.model.num_classes)]
    thirds = samples.position_load.tensor_split(min(3, len(samples.position_load)))
    by_third = torch.stack([calls.mean(0) for calls in thirds])
    return found | {"capacity_by_call": samples.capacity.mean(1).tolist(), "capacity_by_class": by_class,
                    "expert_load": samples.expert_load.mean(0).tolist(),
                    "load_by_position": _rounded(samples.position_load.mean(0)), "load_by_third": _rounded(by_third)}


def _rounded(load: torch.Tensor) -> list[Any]:
    return load.double().round(decimals=4).tolist()  # short in a file; one pair in a thousand images is less


def measure_samples(samples: Samples, config: RunConfig, data: TrainingData | None, cache: Path,
                    device: torch.device) -> dict[str, float]:
    """Return the metrics of samples against ADM's reference where the configuration names it, else against `data`.

    A second extractor's distance stands beside them under its own name.

    The features of `data` are kept in the folder `cache`.

    Raises:
        ConfigError: as `measure` does.
    """
    evaluation = config.evaluation
    weights = _weights(evaluation)
    if evaluation.reference is not None:
        return measure_adm(samples.images, read_reference(Path(evaluation.reference)), device=device,
                           weights_path=weights, kid_subset_size=evaluation.kid_subset_size)
    found = measure(samples.images, data, extractor=evaluation.extractor, device=device,
                    cache_root=cache, weights_path=weights, kid_subset_size=evaluation.kid_subset_size,
                    memorisation=evaluation.memorisation)
    found |= _second_distance(samples, config, data, cache, device)
    if evaluation.extractor == DIGITS:  # a classifier of these classes
        found["class_accuracy"] = (classify(samples.images) == samples.labels).float().mean().item()
    return found


def measure_distances(samples: Samples, config: RunConfig, data: TrainingData | None, cache: Path,
                      device: torch.device) -> dict[str, float]:
    """Return the distances of `measure_samples` under their names there, without the rest where that saves time.

    Raises:
        ConfigError: as `measure` does.
    """
    evaluation = config.evaluation
    if evaluation.reference is not None:
        return {"distance": measure_samples(samples, config, data, cache, device)["distance"]}
    first = frechet_distance(samples.images, data, extractor=evaluation.extractor, device=device, cache_root=cache,
                             weights_path=_weights(evaluation))
    return {"distance": first} | _second_distance(samples, config, data, cache, device)


def _second_distance(samples: Samples, config: RunConfig, data: TrainingData | None, cache: Path,
                     device: torch.device) -> dict[str, float]:
    extractor = config.evaluation.second_extractor
    if extractor is None:
        return {}
    return {distance_name(extractor): frechet_distance(samples.images, data, extractor=extractor, device=device,
                                                       cache_root=cache)}


def sampling_floors(evaluation: EvaluationConfig, data: TrainingData | None, cache: Path,
                    device: torch.device) -> dict[str, float]:
    """Return by a distance's name what as many training images keep from all of them, as `sampling_floor` says.

    A distance that has no such floor is left out, so is ADM's.

    Raises:
        ConfigError: as `measure` does.
    """
    if evaluation.reference is not None:
        return {}
    extractors = {evaluation.extractor: _weights(evaluation)}
    if evaluation.second_extractor is not None:
        extractors[evaluation.second_extractor] = None
    floors = {distance_name(extractor): sampling_floor(data, evaluation.num_samples, extractor=extractor, device=device,
                                                       cache_root=cache, weights_path=weights)
              for extractor, weights in extractors.items()}
    return {name: floor for name, floor in floors.items() if floor is not None}


def _weights(evaluation: EvaluationConfig) -> Path | None:
    return None if evaluation.extractor_weights is None else Path(evaluation.extractor_weights)


def _draw_sweep(model: DiT, config: RunConfig, processes: int, folder: Path) -> list[tuple[float, Samples, float]]:
    """Return each threshold with its samples, all held at once, and their seconds; the model keeps the last."""
    drawn = []
    for threshold in SWEEP_THRESHOLDS:
        for layer in model.moe_layers().values():
            layer.router.threshold.fill_(threshold)  # `global_threshold` is a constant, compiled anew for each value
        started = time.perf_counter()
        samples = sample_together(model, config, range(config.evaluation.num_samples), processes, folder)
        drawn.append((threshold, samples, time.perf_counter() - started))
    return drawn


def _sweep_point(drawn: tuple[float, Samples, float], config: RunConfig, data: TrainingData, cache: Path,
                 device: torch.device) -> dict[str, float]:
    threshold, samples, seconds = drawn
    started = time.perf_counter()
    distances = measure_distances(samples, config, data, cache, device)
    found = activation(config, samples)
    return {"threshold": threshold, "capacity": found["capacity"], **distances,
            "activated_params": found["activated_params"], "seconds": seconds + time.perf_counter() - started}
