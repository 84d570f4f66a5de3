"""The trainer, sampling and the command lines built on them."""

import json
import sys

import pytest
import torch
from conftest import randomise

from diffmoe.cli import run_command
from diffmoe.config import ConfigError, load_config
from diffmoe.data import ImageOrder, load_data
from diffmoe.data.images import seeded_generator, to_model_range, to_pixels
from diffmoe.evaluation import sampling
from diffmoe.evaluation.calibration import calibrate_thresholds
from diffmoe.evaluation.sampling import sample_images
from diffmoe.models.dit import build_model
from diffmoe.report.table1 import table1_rows
from diffmoe.train import CONFIGS, main
from diffmoe.training.checkpoint import load_weights, save_weights
from diffmoe.training.trainer import Trainer

SYSTEMS = {"diffmoe": CONFIGS / "diffmoe.yaml"} | {
    name: CONFIGS.parents[1] / "baselines" / "configs" / f"{name}.yaml"
    for name in ("dense", "token_choice", "expert_choice", "expert_race")}
CPU = torch.device("cpu")


def digits_config(system="diffmoe", *overrides):
    return load_config([CONFIGS / "digits.yaml", SYSTEMS[system]],
                       ["training.batch_size=16", "training.num_images=1600", *overrides])


def make_trainer(system="diffmoe", *overrides, seed=0):
    config = digits_config(system, *overrides)
    return Trainer(config, seed, load_data(config.data, config.model), CPU)


@pytest.fixture
def noisy_model():
    """A DiffMoE whose every weight is random, so that nothing is zero by initialisation."""
    config = digits_config("diffmoe")
    model = build_model(config.model)
    for index, tensor in enumerate([*model.parameters(), *(m.router.threshold for m in model.moe_layers().values())]):
        torch.nn.init.normal_(tensor.detach(), 0.3, 0.2, generator=torch.Generator().manual_seed(index))
    return model.eval()


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_learns_on_the_same_trainer(system):
    trainer = make_trainer(system)
    first = trainer.train_step()["mse"]
    for _ in range(39):
        last = trainer.train_step()["mse"]
    assert last < 0.75 * first


def test_same_seed_gives_the_same_losses_bit_for_bit_and_another_seed_does_not():
    def losses(seed):
        trainer = make_trainer(seed=seed)
        return [trainer.train_step()["mse"].item() for _ in range(5)]

    assert losses(0) == losses(0) != losses(1)


def test_a_step_depends_on_its_number_alone():
    early, late = make_trainer(), make_trainer()
    for _ in range(3):
        late.train_step()
    for name in ("images", "labels", "noise", "times"):
        assert torch.equal(getattr(early.batch(7), name), getattr(late.batch(7), name))


def test_every_epoch_is_a_new_permutation_of_all_images():
    order = ImageOrder(10, seed=0)
    first, second = order.indices(0, 10), order.indices(10, 10)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()
    assert torch.equal(order.indices(7, 6), torch.cat([first[7:], second[:3]]))


def test_labels_are_dropped_at_the_configured_rate():
    trainer = make_trainer("dense", "training.batch_size=1600", "model.class_dropout_prob=0.25")
    dropped = (trainer.batch(0).labels == 10).float().mean().item()
    assert dropped == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 1600) ** 0.5)


def test_beta2_reaches_the_optimiser():
    betas = [make_trainer("dense", *change).optimizer.defaults["betas"] for change in ([], ["training.adam_beta2=0.5"])]
    assert betas == [(0.9, 0.999), (0.9, 0.5)]


def test_experts_have_a_learning_rate_of_their_own_after_a_resume_too():
    def moved(*change: str, steps: int) -> dict[str, torch.Tensor]:
        trainer = make_trainer("diffmoe", "training.learning_rate=0.01", *change)
        for step in range(steps):
            if step == 1:
                state, trainer = trainer.state(), make_trainer("diffmoe", "training.learning_rate=0.01", *change)
                trainer.load_state(state, 1)
            before = {name: value.clone() for name, value in trainer.model.named_parameters()}
            trainer.train_step()
        return {name: (value - before[name]).abs() for name, value in trainer.model.named_parameters()}

    # AdamW's first step is as long as the rate wherever there is a gradient
    for name, change in moved("training.expert_rate=0.25", steps=1).items():
        if change.any():
            torch.testing.assert_close(change.max().item(), 0.0025 if ".experts." in name else 0.01, rtol=1e-3, atol=0)
    plain, changed = moved(steps=2), moved("training.expert_rate=0.25", steps=2)
    for name, change in plain.items():
        if change.any():
            ratio = (changed[name].norm() / change.norm()).item()
            assert (0.1 < ratio < 0.6) if ".experts." in name else (0.5 < ratio < 2), (name, ratio)


def test_clipping_leaves_predictors_alone():
    clipped, free = make_trainer("diffmoe", "training.clip_norm=1e-12"), make_trainer("diffmoe")
    found = clipped.train_step()["gradient_norm"], free.train_step().get("gradient_norm")
    backbone = [value.grad for name, value in free.model.named_parameters() if ".predictor." not in name]
    torch.testing.assert_close(found[0], torch.nn.utils.get_total_norm(backbone))  # as it was before the clipping
    assert found[1] is None
    gradients = {name: parameter.grad for name, parameter in clipped.model.named_parameters()}
    for name, parameter in free.model.named_parameters():
        if ".predictor." in name:
            assert torch.equal(gradients[name], parameter.grad)
        else:
            assert gradients[name].norm() <= 1e-12


def test_thresholds_move_once_a_step_and_the_average_copies_them():
    trainer = make_trainer()
    thresholds = [layer.router.threshold for layer in trainer.model.moe_layers().values()]
    trainer.losses(trainer.batch(0))
    assert all((threshold == 0).all() for threshold in thresholds)
    trainer.train_step()
    assert all((threshold > 0).all() for threshold in thresholds)
    averaged = [layer.router.threshold for layer in trainer.ema.model.moe_layers().values()]
    assert all(torch.equal(a, b) for a, b in zip(averaged, thresholds, strict=True))


@pytest.mark.parametrize(("system", "overrides"), [
    ("dense", []), ("token_choice", []), ("expert_choice", []), ("expert_race", []),
    ("diffmoe", ["model.moe.router.selection=predictor"])])
def test_an_image_depends_on_its_own_seed_alone(system, overrides):
    config = digits_config(system, "sampling.num_steps=3", *overrides)
    model = build_model(config.model)
    for index, tensor in enumerate(model.parameters()):
        torch.nn.init.normal_(tensor.detach(), std=0.2, generator=torch.Generator().manual_seed(index))
    together = sample_images(model.eval(), config, [3, 14, 15])
    alone = sample_images(model, config, [14])
    assert together.labels[1] == alone.labels[0] == 4
    assert (together.images[1].int() - alone.images[0].int()).abs().max() <= 1  # of 255: float32 rounding


def test_an_overflow_repeats_the_batch_and_changes_nothing(noisy_model, monkeypatch):
    config = digits_config("diffmoe", "sampling.num_steps=3")
    exact = sample_images(noisy_model, config, range(4))
    bounds = []
    prepare_call = sampling.prepare_call
    monkeypatch.setattr(sampling, "FIRST_ROW_BOUND", 0.25)
    monkeypatch.setattr(sampling, "prepare_call", lambda model, config, bound, **more: bounds.append(bound)
                        or prepare_call(model, config, bound, **more))
    repeated = sample_images(noisy_model, config, range(4))
    assert bounds[:2] == [0.25, 0.5]
    assert torch.equal(exact.images, repeated.images)
    torch.testing.assert_close(exact.capacity, repeated.capacity)


def test_measured_capacity_is_the_share_of_pairs_that_ran(noisy_model):
    config = digits_config("diffmoe", "sampling.num_steps=2", "model.moe.router.global_threshold=0.0")
    everything = sample_images(build_model(config.model).eval(), config, range(3))
    torch.testing.assert_close(everything.capacity, torch.full((4, 3), 8.0))  # Heun calls twice; all 8 experts
    torch.testing.assert_close(everything.expert_load, torch.ones(4, 2, 8))
    some = sample_images(noisy_model, digits_config("diffmoe", "sampling.num_steps=2"), range(3))
    torch.testing.assert_close(some.expert_load.sum(2).mean(1), some.capacity.mean(1))
    assert sample_images(build_model(digits_config("dense").model).eval(), digits_config("dense"), [0]).capacity is None


def test_pixels_survive_the_trip_through_the_models_range():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_model_range(pixels)), pixels)


def test_generators_depend_on_their_whole_key():
    def draw(*key):
        return torch.randn(4, generator=seeded_generator(*key)).tolist()

    assert draw("step", 1, 2) == draw("step", 1, 2)
    assert len({tuple(draw(*key)) for key in [("step", 1, 2), ("step", 12), ("step", 2, 1), ("order", 1, 2)]}) == 4


def test_weights_survive_the_file_and_damage_is_one_clear_line(tmp_path):
    state, path = {"a": torch.randn(3, 2), "b": torch.arange(4)}, tmp_path / "weights.safetensors"
    save_weights(path, state, {"seed": 3})
    loaded, description = load_weights(path)
    assert description == {"seed": 3}
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ConfigError, match="not a checkpoint"):
        load_weights(path)


def test_the_train_command_writes_losses_weights_and_samples(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "run"), "training.num_images=256", "sampling.num_steps=2"]
    assert main(arguments) == 0
    losses = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    assert losses[-1]["step"] == 256 // 64
    weights, description = load_weights(tmp_path / "run" / "ema.safetensors")
    config = load_config([tmp_path / "run" / "config.yaml"])
    assert build_model(config.model).load_state_dict(weights)
    assert description["seed"] == 0
    assert (tmp_path / "run" / "samples.png").stat().st_size > 1000
    assert "capacity" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [
    ["training.batch_sizes=3"], ["--config", "no-such-file.yaml"], ["data.name=mnist"], ["runtime.device=cuda:9"],
    ["model.in_channels=3"], ["model.moe.capacity=0.0001"], ["training.learning_rate=fast"]])
def test_a_mistake_is_one_line_and_exit_code_2(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(tmp_path / "run"), *arguments])
    assert run_command(main) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        main(["--out", str(tmp_path / "file" / "run")])


def test_table1_matches_the_counts_of_the_authors_models():
    rows = {row[0]: row for row in table1_rows()}
    # Counted by building the authors' models, whose totals hold the fixed position table of 256 x width.
    for name, total, width in (("DiffMoE-S-E16", 140_265_344, 384), ("DiffMoE-B-E16", 559_222_400, 768)):
        assert rows[name][6].startswith(f"{(total - 256 * width) / 1e6:.1f}")
    assert rows["DiffMoE-L-E16"][6] == "1981.7 / 1982*"
    assert rows["DiffMoE-S-E16"][7] == "139.2 / 139"
    assert rows["DiffMoE-L-E16"][8:10] == ["459.4 / 458", "470.8"]  # the paper's Eq. 40, and strict


def test_calibrated_thresholds_are_what_the_rule_observes_of_the_network_that_samples():
    config = digits_config("diffmoe", "model.moe.router.calibration_batches=1")
    data = load_data(config.data, config.model)
    model = randomise(build_model(config.model)).eval()
    first = model.moe_layers()[1]
    before = first.router.threshold.clone()
    assert calibrate_thresholds(model, digits_config("diffmoe"), 3, data) is model
    assert torch.equal(first.router.threshold, before)

    calibrate_thresholds(model, config, 3, data)
    trainer = Trainer(config, 3, data, CPU)
    batch = trainer.batch(config.training.num_steps)
    seen = []
    first.router.register_forward_pre_hook(lambda router, inputs: seen.append(inputs[0]))
    model(trainer.process.add_noise(batch.images, batch.noise, batch.times), batch.times, batch.labels)
    passing_E = (first.router.probabilities(seen[0]) > first.router.threshold).sum(0)
    k = 16 * config.model.num_tokens // config.model.moe.num_experts
    assert passing_E.tolist() == [k - 1] * config.model.moe.num_experts  # the k-th is the threshold itself
