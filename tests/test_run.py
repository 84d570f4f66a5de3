"""Runs that are interrupted, gone on with, shared and refused; several processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from processes import LOOPBACK
from test_training import CPU, digits_config

from diffmoe.config import ConfigError, to_dict
from diffmoe.data import load_data
from diffmoe.sample import load_trained
from diffmoe.training.checkpoint import Checkpoints, load_weights, locked
from diffmoe.training.distributed import ALONE, World
from diffmoe.training.ema import average_file
from diffmoe.training.graph import EAGER_CALLS
from diffmoe.training.run import Interrupted, train_run
from diffmoe.training.trainer import Trainer

SMALL = ["training.num_images=960"]  # 60 steps of 16


def train(folder, config=None, seed=0, **options):
    config = config or digits_config("diffmoe", *SMALL)
    return train_run(config, seed, load_data(config.data, config.model), folder, CPU, **options)


def newest(folder):
    """Return the description of the newest checkpoint."""
    return Checkpoints(folder).newest()[1]


def outcome(run):
    return run.losses(), load_weights(run.folder / "ema.safetensors")[0]


def assert_same(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", deadline=time.monotonic())
    assert newest(tmp_path / "parts")["step"] == 1
    assert_same(outcome(train(tmp_path / "parts")), outcome(whole))
    assert not list((tmp_path / "parts").glob("checkpoint-*"))


def test_the_turn_is_waited_for_once_after_the_steps_that_compile_and_is_no_time_of_training(tmp_path):
    steps, taken = [], []

    @contextmanager
    def turn():
        time.sleep(3)
        taken.append(len(steps))
        yield
        taken.append(len(steps))

    run = train(tmp_path, turn=turn, progress=lambda step, losses: steps.append(step))
    assert taken == [EAGER_CALLS - 1, 60]  # whoever follows the run is told of a step at its end
    assert run.description["seconds"] < 3
    before, after = (json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()[:2])
    assert after["seconds"] - before["seconds"] < 3
    assert after["images_per_second"] > 25 * 16 / 3


def test_a_signal_ends_the_wait_for_a_turn_and_the_run_goes_on_bit_for_bit(tmp_path):
    whole = train(tmp_path / "whole")

    def turn():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)  # goes on after a signal whose handler returns, as waiting for a lock does
        raise AssertionError("waited to the end")

    with pytest.raises(Interrupted) as stopped:
        train(tmp_path / "parts", turn=turn)
    assert stopped.value.signum == signal.SIGTERM and newest(tmp_path / "parts")["step"] == EAGER_CALLS
    assert_same(outcome(train(tmp_path / "parts")), outcome(whole))


def test_several_averages_of_a_run_are_those_of_runs_with_one_and_are_chosen_afterwards(tmp_path):
    several = digits_config("diffmoe", *SMALL, "training.ema_half_life_images=100",
                            "training.extra_ema_half_lives=[400.5, 1e+6]")
    whole = train(tmp_path / "whole", several)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", several, deadline=time.monotonic())
    parts = train(tmp_path / "parts", several)
    files = ("ema.safetensors", "ema-400.5.safetensors", "ema-1000000.safetensors")
    for half_life, file in zip((100, 400.5, 1e6), files, strict=True):
        alone = train(tmp_path / file, digits_config("diffmoe", *SMALL, f"training.ema_half_life_images={half_life}"))
        expected = outcome(alone)[1]
        for run in (whole, parts):  # the second was interrupted
            found = load_weights(run.folder / file)[0]
            assert found.keys() == expected.keys()
            assert all(torch.equal(value, expected[name]) for name, value in found.items())
    chosen = replace(several, evaluation=replace(several.evaluation, ema_half_life_images=400.5))
    expected = load_weights(whole.folder / files[1])[0]
    for model in (whole.load_average(chosen, CPU),
                  load_trained(whole.folder / files[0], ["evaluation.ema_half_life_images=400.5"]).model(CPU)):
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_budget_is_what_a_shorter_run_gives_and_the_run_goes_on_from_it(tmp_path):
    budgets = ["training.budgets=[320, 640]", "training.extra_ema_half_lives=[400]"]
    whole = digits_config("diffmoe", *SMALL, *budgets)
    at = {images: replace(whole, evaluation=replace(whole.evaluation, budget_images=images)) for images in (320, 640)}
    runs = [(320, train(tmp_path / "run", at[320])), (None, train(tmp_path / "run", whole)),
            (640, train(tmp_path / "run", at[640]))]  # the last was passed on the way
    assert [run.description["step"] for _, run in runs] == [20, 60, 40]
    for images, run in runs:
        short = train(tmp_path / f"{images}", digits_config(
            "diffmoe", f"training.num_images={images or 960}", "training.extra_ema_half_lives=[400]"))
        assert all(step <= run.description["step"] for step, _ in run.losses())
        for half_life in (None, 400):
            kept = load_weights(run.folder / average_file(half_life, images))[0]
            expected = load_weights(short.folder / average_file(half_life))[0]
            assert all(torch.equal(value, expected[name]) for name, value in kept.items())
    chosen = load_trained(tmp_path / "run" / "ema.safetensors", ["evaluation.budget_images=320"])
    assert chosen.description["step"] == 20
    expected = runs[0][1].load_average(at[320], CPU).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in chosen.model(CPU).state_dict().items())


def test_a_crash_behind_a_budget_takes_nothing_from_its_log(tmp_path):
    whole = digits_config("dense", *SMALL, "training.budgets=[800]")  # step 50, where the log has a line

    def crash(step, losses):
        assert step < 55, "crash"

    with pytest.raises(AssertionError, match="crash"):
        train(tmp_path, whole, progress=crash)
    crashed = train(tmp_path, replace(whole, evaluation=replace(whole.evaluation, budget_images=800)))
    before = crashed.losses()
    assert [step for step, _ in before] == [25, 50]
    with pytest.raises(Interrupted):
        train(tmp_path, whole, deadline=0.0)  # it goes on, which cuts the log back to where it starts
    assert crashed.losses() == before


def test_a_crash_between_a_budgets_checkpoint_and_its_averages_loses_neither(tmp_path, monkeypatch):
    whole = digits_config("dense", *SMALL, "training.budgets=[320]")  # step 20, where the log has no line

    def full(*arguments):
        raise OSError("No space left")

    with monkeypatch.context() as patched:
        patched.setattr("diffmoe.training.run.save_weights", full)
        with pytest.raises(ConfigError, match="No space left"):
            train(tmp_path, whole)
    assert newest(tmp_path)["step"] == 20
    train(tmp_path, whole)
    assert load_weights(tmp_path / average_file(budget_images=320))[1]["step"] == 20


def test_an_interrupted_run_to_a_budget_stops_there_too(tmp_path):
    config = digits_config("diffmoe", *SMALL, "training.budgets=[320]", "evaluation.budget_images=320")
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", config, deadline=time.monotonic())
    parts, whole = train(tmp_path / "parts", config), train(tmp_path / "whole", config)
    assert parts.losses() == whole.losses() and newest(tmp_path / "parts")["step"] == 20
    (tmp_path / "parts" / average_file(budget_images=320)).unlink()
    train(tmp_path / "parts", config)  # its checkpoint is of the same step
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", replace(config, evaluation=replace(config.evaluation, budget_images=None)),
              progress=lambda step, losses: os.kill(os.getpid(), signal.SIGINT) if step == 30 else None)
    (tmp_path / "parts" / average_file(budget_images=320)).unlink()
    with pytest.raises(ConfigError, match="ema-at-320.safetensors: missing"):
        train(tmp_path / "parts", config)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_leaves_with_its_code(tmp_path, number):
    folder = tmp_path / "run"
    log = folder / "losses.jsonl"
    arguments = [sys.executable, "-m", "diffmoe.train", "--out", folder, "training.batch_size=16",
                 "training.num_images=6400000"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (log.exists() and log.read_text()):  # it trains
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1] == "stopped, with the state saved; the same command goes on"
    assert newest(folder)["step"] >= 1


def test_a_killed_run_goes_on_from_its_checkpoint_and_forgets_later_log_lines(tmp_path):
    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "killed", deadline=time.monotonic())
    with (tmp_path / "killed" / "losses.jsonl").open("a") as log:  # what a killed process wrote after its last save
        log.write('{"step": 50, "images": 800, "mse": 0.1, "predictor": 0.1}\n')
    assert_same(outcome(train(tmp_path / "killed")), outcome(whole))


def test_a_finished_run_is_not_run_again(tmp_path):
    first = train(tmp_path)
    written = (tmp_path / "ema.safetensors").stat().st_mtime_ns
    assert train(tmp_path).description == first.description
    assert (tmp_path / "ema.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("other", [{"seed": 1}, {"config": digits_config("dense", *SMALL)}])
def test_the_folder_of_another_run_is_refused(tmp_path, other):
    train(tmp_path)
    with pytest.raises(ConfigError, match="of another run"):
        train(tmp_path, **other)


def test_a_folder_in_use_is_refused_and_names_the_process(tmp_path):
    with locked(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()} is working"):
        train(tmp_path)
    trained = train(tmp_path)
    with locked(tmp_path):
        assert train(tmp_path).description == trained.description  # what is finished can be read meanwhile


def test_who_is_about_to_let_go_of_a_folder_is_waited_for(tmp_path):
    held, let_go = threading.Event(), threading.Event()

    def hold():
        with locked(tmp_path):
            held.set()
            let_go.wait(10)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(10)
    threading.Timer(0.3, let_go.set).start()
    train(tmp_path)
    assert let_go.is_set()
    other.join(10)


def test_a_loss_that_is_no_number_is_one_line_and_the_log_stays(tmp_path):
    with pytest.raises(ConfigError, match=r"step 25: \d+ steps changed nothing.*inf"):
        train(tmp_path, digits_config("dense", *SMALL, "training.learning_rate=1e30", "runtime.max_skipped_steps=10"))
    assert not (tmp_path / "ema.safetensors").exists()


@pytest.mark.parametrize(("system", "size", "works"), [
    ("dense", 4, True), ("expert_choice", 4, True), ("token_choice", 4, True), ("diffmoe", 4, False),
    ("expert_race", 8, False), ("dense", 5, False)])
def test_micro_batches_may_not_cut_a_pool(system, size, works):
    config = digits_config(system, f"runtime.micro_batch_size={size}")
    data = load_data(config.data, config.model)
    if works:
        assert Trainer(config, 0, data, CPU).micro_batch == size
    else:
        with pytest.raises(ConfigError, match=rf"micro_batch_size={size}: .*16"):
            Trainer(config, 0, data, CPU)


def test_a_process_count_may_not_cut_a_pool():
    config = digits_config("diffmoe")
    with pytest.raises(ConfigError, match=r"=8: .*pool spans 16 images"):
        Trainer(config, 0, load_data(config.data, config.model), CPU, World(0, 2))


@pytest.mark.parametrize("system", ["dense", "expert_choice"])
def test_accumulation_does_not_change_the_result(system):
    def losses(*overrides):
        return some_losses(digits_config(system, "training.precision=fp64", *overrides))

    assert losses("runtime.micro_batch_size=4") == pytest.approx(losses(), rel=1e-10)


WORKER = """
import json, sys
import torch
from diffmoe.config import load_config
from test_run import some_losses
from diffmoe.training.distributed import join_world
torch.set_num_threads(1)
with join_world(torch.device("cpu")) as world:
    losses = [some_losses(load_config([path]), world) for path in sys.argv[1:]]
    if world.is_main:
        print(json.dumps(losses))
"""


def some_losses(config, world=ALONE):
    trainer = Trainer(config, 0, load_data(config.data, config.model), CPU, world)
    return [world.mean([trainer.train_step()["mse"]])[0].item() for _ in range(8)]


@pytest.mark.slow  # test_parallel.py has it without torchrun
def test_two_processes_equal_one_in_float64(tmp_path):
    configs = [digits_config(system, "training.precision=fp64") for system in ("dense", "expert_choice")]
    paths = [tmp_path / f"{index}.yaml" for index in range(len(configs))]
    for path, config in zip(paths, configs, strict=True):
        path.write_text(yaml.safe_dump(to_dict(config)))
    (tmp_path / "worker.py").write_text(WORKER)
    run = subprocess.run(  # by address and interface: a test machine's own name need not resolve
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
         "--nproc-per-node", "2", tmp_path / "worker.py", *paths], capture_output=True, text=True, check=False,
        env=os.environ | LOOPBACK | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])})
    assert run.returncode == 0, run.stderr
    for config, losses in zip(configs, json.loads(run.stdout.splitlines()[-1]), strict=True):
        assert losses == pytest.approx(some_losses(config), rel=1e-10)
