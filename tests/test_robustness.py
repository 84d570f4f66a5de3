"""Nothing lost: real processes are killed, signalled, starved of disk, and go on as if nothing had happened.

`make soak` does the faults again and again, each time elsewhere in the run, and kills more often (`KILLS`). Two
processes are over gloo on this machine.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from processes import (
    HANG_S,
    LOG_EVERY,
    LOOPBACK,
    assert_same_outcome,
    finish,
    free_port,
    images,
    said,
    start,
    wait_for,
)
from test_data import idx_bytes

from diffmoe.training.checkpoint import Checkpoints
from diffmoe.training.log import read_lines

KILLS = int(os.environ.get("KILLS", "10"))
STEPS = 60
FAULT_STEP = 30


def checkpoints(folder):
    return Checkpoints(folder).paths()


def last_step(folder):
    return Checkpoints(folder).newest()[1]["step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert finish(start(folder.with_name("warm"), images(LOG_EVERY))) == 0
    started = time.monotonic()
    assert finish(start(folder, images(STEPS))) == 0
    return folder, time.monotonic() - started


@pytest.fixture
def at(rng):
    """A step at which something happens: after the second checkpoint, and early enough for what follows."""
    return rng.randrange(2 * LOG_EVERY, STEPS - 3 * LOG_EVERY - 1)


def saved_before(at):
    """Return the step of the newest checkpoint at a step."""
    return at - at % LOG_EVERY


@pytest.mark.fault("kill -9 while a file is written")
@pytest.mark.fault("kill -9 at a random moment")
def test_a_run_killed_at_random_moments_equals_one_that_was_not(whole, tmp_path, rng, record_property):
    whole, seconds = whole
    killed, folders = Counter(), (tmp_path / str(number) for number in count())
    folder = next(folders)
    while killed.total() < KILLS:
        process = start(folder, images(STEPS))
        process.join(rng.uniform(0, seconds))
        asides = f"*.{process.pid}.partial"
        while killed.total() % 2 and process.is_alive() and not list(folder.glob(asides)):
            pass  # every other one is killed while a file is written
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            writing = bool(list(folder.glob(asides)))
            killed["kill -9 while a file is written" if writing else "kill -9 at a random moment"] += 1
        else:  # it was done before it could be killed: another one
            assert process.exitcode == 0, said(folder)
            assert_same_outcome(folder, whole)
            folder = next(folders)
    if process.exitcode != 0:
        assert finish(start(folder, images(STEPS))) == 0
    assert_same_outcome(folder, whole)
    assert not list(folder.glob("*.partial")) and not checkpoints(folder)
    assert said(folder) == ""
    record_property("survived", dict(killed))


def kill_myself(step, folder, at=FAULT_STEP):
    if step == at:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a process that was killed after half of its steps."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    assert finish(start(folder, images(STEPS), fault=kill_myself)) == -signal.SIGKILL
    assert [path.stem for path in checkpoints(folder)] == [f"checkpoint-{step:09d}" for step in
                                                           (0, FAULT_STEP - LOG_EVERY, FAULT_STEP)]
    return folder


def flip_a_bit(content, rng):
    position = rng.randrange(len(content))
    return content[:position] + bytes([content[position] ^ 1 << rng.randrange(8)]) + content[position + 1:]


DAMAGE = {"truncated": lambda content, rng: content[:rng.randrange(1, len(content))], "bit-flipped": flip_a_bit,
          "half-deleted": lambda content, rng: content[:len(content) // 2], "empty": lambda content, rng: b""}


@pytest.mark.fault("newest checkpoint {damage}")
@pytest.mark.parametrize("damage", DAMAGE)
def test_of_a_damaged_checkpoint_the_one_before_is_used_and_a_warning_names_the_file(whole, killed, tmp_path, rng,
                                                                                     damage):
    folder = shutil.copytree(killed, tmp_path / "run")
    newest = checkpoints(folder)[-1]
    newest.write_bytes(DAMAGE[damage](newest.read_bytes(), rng))
    assert finish(start(folder, images(STEPS))) == 0
    (warning,) = said(folder).splitlines()
    assert str(newest) in warning and "going on from the one before" in warning
    assert_same_outcome(folder, whole[0])


@pytest.mark.fault("every checkpoint empty, and half a log line")
def test_with_every_checkpoint_damaged_and_half_a_log_line_the_run_starts_again(whole, killed, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "run")
    for path in checkpoints(folder):
        path.write_bytes(b"")
    with (folder / "losses.jsonl").open("ab") as log:
        log.write(b'{"step": 35, "ima\xff')
    assert finish(start(folder, images(STEPS))) == 0
    assert len(said(folder).splitlines()) == 3
    assert_same_outcome(folder, whole[0])


# ---------------------------------------------------------------- signals

def interrupt_twice(step, folder, at):
    if step == at:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on after the second")


def send_myself(step, folder, number, at):
    if step == at:
        os.kill(os.getpid(), number)


SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)


@pytest.mark.fault("{number.name} while training")
@SIGNALS
def test_a_signal_saves_the_step_it_came_in_and_the_next_start_goes_on(whole, tmp_path, at, number):
    whole, seconds = whole
    folder = tmp_path / "run"
    process = start(folder, images(STEPS), fault=partial(send_myself, number=number, at=at))
    assert finish(process, seconds + 10) == 128 + number
    assert said(folder) == "stopped, with the state saved; the same command goes on\n"
    assert last_step(folder) == at
    assert finish(start(folder, images(STEPS))) == 0
    assert_same_outcome(folder, whole)


@pytest.mark.fault("a second SIGINT")
def test_a_second_sigint_stops_at_once_and_loses_only_what_came_after_the_last_checkpoint(whole, tmp_path, at):
    folder = tmp_path / "run"
    assert finish(start(folder, images(STEPS), fault=partial(interrupt_twice, at=at))) == 128 + signal.SIGINT
    assert said(folder) == ""
    assert last_step(folder) == saved_before(at)
    assert finish(start(folder, images(STEPS))) == 0
    assert_same_outcome(folder, whole[0])


@pytest.mark.fault("{number.name} while sampling")
@SIGNALS
def test_a_signal_during_sampling_stops_at_once_and_the_trained_weights_are_there(tmp_path, number):
    folder = tmp_path / "run"
    process = start(folder, images(5), "sampling.num_steps=1000000", sample=True)
    wait_for(lambda: (folder / "ema.safetensors").exists())
    time.sleep(0.1)
    sent = time.monotonic()
    os.kill(process.pid, number)
    assert finish(process, 10) in (-number, 128 + number)
    assert time.monotonic() - sent < 10
    assert (folder / "ema.safetensors").exists() and said(folder) == ""


# ---------------------------------------------------------------- disks and folders

def fill_the_disk(step, folder, at):
    """Let no file grow: what RLIMIT_FSIZE refuses is refused in the middle of a write, as on a full disk."""
    if step == at:
        room = (folder / "losses.jsonl").stat().st_size + 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))


def fill_the_disk_for_a_while(step, folder, at):
    fill_the_disk(step, folder, at)
    if step == at + 3 * LOG_EVERY:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def fill_the_disk_and_stop(step, folder, at):
    fill_the_disk(step, folder, at)
    send_myself(step, folder, signal.SIGTERM, at + LOG_EVERY)


def lose_permission(step, folder, at):
    if step == at:
        if os.geteuid() == 0:
            os.seteuid(65534)
        else:
            folder.chmod(0o500)


@pytest.mark.parametrize(("fault", "reason"), [
    pytest.param(fill_the_disk, "File too large", marks=pytest.mark.fault("full disk (RLIMIT_FSIZE)")),
    pytest.param(fill_the_disk_and_stop, "File too large", marks=pytest.mark.fault("full disk, then SIGTERM")),
    pytest.param(lose_permission, "Permission denied", marks=pytest.mark.fault("folder that becomes read-only"))])
def test_a_run_that_cannot_write_ends_with_one_line_and_loses_nothing(whole, tmp_path, at, fault, reason):
    folder = tmp_path / "run"
    assert finish(start(folder, images(STEPS), fault=partial(fault, at=at))) == 2
    folder.chmod(0o700)
    *warnings, error = said(folder).splitlines()
    assert error.startswith("error: ") and str(folder) in error and reason in error
    assert warnings and all("going on" in warning or "wait in memory" in warning for warning in warnings)
    last = saved_before(at)
    assert last_step(folder) == last
    logged = [line["step"] for line in read_lines(folder / "losses.jsonl")]
    assert logged[:last // LOG_EVERY] == list(range(LOG_EVERY, last + 1, LOG_EVERY))
    assert finish(start(folder, images(STEPS))) == 0
    assert_same_outcome(folder, whole[0])


@pytest.mark.fault("disk full for a while")
def test_a_disk_that_is_full_for_a_while_costs_nothing(whole, tmp_path, at):
    folder = tmp_path / "run"
    assert finish(start(folder, images(STEPS), fault=partial(fill_the_disk_for_a_while, at=at))) == 0
    assert "wait in memory" in said(folder)
    assert_same_outcome(folder, whole[0])


def dawdle(step, folder, at):
    if step == at:
        time.sleep(60)


@pytest.mark.fault("two processes in one folder, then a stale lock")
def test_a_second_process_is_refused_by_the_name_of_the_first_and_a_dead_ones_lock_is_taken_over(whole, tmp_path, at):
    folder = tmp_path / "run"
    first = start(folder, images(STEPS), fault=partial(dawdle, at=at))
    wait_for(lambda: len(checkpoints(folder)) > 1)
    assert finish(start(folder, images(STEPS))) == 2
    assert said(folder) == f"error: {folder}: process {first.pid} is working in this folder; wait for it or stop it\n"
    first.kill()
    first.join()
    assert finish(start(folder, images(STEPS))) == 0
    assert_same_outcome(folder, whole[0])


# ---------------------------------------------------------------- several processes

def start_two(folder, *overrides, fault=None, other=(), other_seed=0):
    """Start two; `fault`, `other` (overrides) and `other_seed` are the second one's."""
    port = free_port()
    return [start(folder, "model.moe.router.pool=sample", *overrides, *(other if rank else ()), rank=rank, port=port,
                  seed=other_seed if rank else 0, fault=fault if rank else None) for rank in (0, 1)]


def finish_two(processes):
    return [finish(process, 60) for process in processes]


def stop_myself(step, folder, at=FAULT_STEP):
    if step == at:
        os.kill(os.getpid(), signal.SIGSTOP)


@pytest.fixture(scope="module")
def whole_by_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    assert finish_two(start_two(folder, images(STEPS))) == [0, 0]
    return folder


def test_a_finished_run_is_returned_to_all_processes(whole_by_two):
    before = (whole_by_two / "ema.safetensors").stat().st_mtime_ns
    assert finish_two(start_two(whole_by_two, images(STEPS))) == [0, 0]
    assert (whole_by_two / "ema.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("fault", [pytest.param(kill_myself, marks=pytest.mark.fault("a rank that dies")),
                                   pytest.param(stop_myself, marks=pytest.mark.fault("a rank that hangs"))])
def test_a_process_that_dies_or_hangs_ends_the_others_and_a_new_start_goes_on(whole_by_two, tmp_path, at, fault):
    folder = tmp_path / "run"
    main, other = start_two(folder, images(STEPS), fault=partial(fault, at=at))
    assert finish(main, 60) != 0
    if fault is stop_myself:
        assert f"has made no step for {HANG_S:.0f} s: another one hangs or died" in said(folder, 0)
    other.kill()  # torchrun's part
    other.join()
    assert last_step(folder) in (saved_before(at) - LOG_EVERY, saved_before(at))
    assert finish_two(start_two(folder, images(STEPS))) == [0, 0]
    assert_same_outcome(folder, whole_by_two)


def slow_down(step, folder, at):
    if at <= step < at + LOG_EVERY:
        time.sleep(1.25 * HANG_S / LOG_EVERY)


@pytest.mark.fault("a rank that is slow")
def test_slow_steps_are_no_hang(whole_by_two, tmp_path, at):
    folder = tmp_path / "run"
    assert finish_two(start_two(folder, images(STEPS), fault=partial(slow_down, at=at))) == [0, 0]
    assert_same_outcome(folder, whole_by_two)


@pytest.mark.fault("{number.name} to one rank")
@SIGNALS
def test_a_signal_to_one_process_stops_all_with_the_state_saved(whole_by_two, tmp_path, at, number):
    folder = tmp_path / "run"
    fault = partial(send_myself, number=number, at=at)
    assert finish_two(start_two(folder, images(STEPS), fault=fault))[1] == 128 + number
    assert at <= last_step(folder) < STEPS
    assert finish_two(start_two(folder, images(STEPS))) == [0, 0]
    assert_same_outcome(folder, whole_by_two)


@pytest.mark.fault("ranks that disagree")
@pytest.mark.parametrize(("different", "named"), [
    ({"other_seed": 1}, "seed=1 in process 1 of 2, but 0 in process 0"),
    ({"other": ["training.learning_rate=0.02"]}, "config_digest="),
    ({"other": ["runtime.backend=loop"]}, "runtime.backend=loop in process 1 of 2, but auto in process 0")])
def test_processes_that_were_started_differently_are_refused_with_the_key(tmp_path, different, named):
    folder = tmp_path / "run"
    assert finish_two(start_two(folder, images(STEPS), **different)) == [2, 2]
    assert said(folder, 0).startswith("error: ") and named in said(folder, 0) and said(folder, 0).count("\n") == 1
    assert not checkpoints(folder)


@pytest.mark.fault("ranks with other data")
def test_processes_with_other_data_are_refused(tmp_path):
    paths = tmp_path / "mine", tmp_path / "other"
    for pixel, path in enumerate(paths):
        path.mkdir()
        (path / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.full((10, 8, 8), pixel, np.uint8)))
        (path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(10, dtype=np.uint8)))
    folder = tmp_path / "run"
    assert finish_two(start_two(folder, "data.name=idx", f"data.path={paths[0]}",
                                other=[f"data.path={paths[1]}"])) == [2, 2]
    assert said(folder, 0).startswith("error: data_digest=")


WORKER = """
import sys
from pathlib import Path
import test_robustness
from processes import images, train

folder = Path(sys.argv[1])
fault = getattr(test_robustness, sys.argv[2]) if not list(folder.glob("checkpoint-*")) else None
train(folder, ("model.moe.router.pool=sample", images(test_robustness.STEPS)), fault, None, 0, 0, False, 0.0)
"""


def in_the_second(fault):
    return lambda step, folder: fault(step, folder) if os.environ["RANK"] == "1" else None


kill_the_second, stop_the_second = in_the_second(kill_myself), in_the_second(stop_myself)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [
    pytest.param("kill_the_second", marks=pytest.mark.fault("torchrun: a rank that dies, started again")),
    pytest.param("stop_the_second", marks=pytest.mark.fault("torchrun: a rank that hangs, started again"))])
def test_torchrun_starts_a_job_again_that_lost_a_process_and_it_goes_on(whole_by_two, tmp_path, fault):
    folder = tmp_path / "run"
    (tmp_path / "worker.py").write_text(WORKER)
    started = time.monotonic()
    job = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
         "--nproc-per-node", "2", "--max-restarts", "3", tmp_path / "worker.py", folder, fault],
        capture_output=True, text=True, check=False,
        env=os.environ | LOOPBACK | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])})
    print(f"{fault}: {time.monotonic() - started:.0f} s in all")
    assert job.returncode == 0, job.stderr
    assert_same_outcome(folder, whole_by_two)


# ---------------------------------------------------------------- long runs

def measure_myself(step, folder):
    """Write down resident memory, open files and the size of the logs."""
    if step % 500 == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        logs = sum((folder / name).stat().st_size for name in ("losses.jsonl", "events.jsonl"))
        with folder.with_suffix(".measured").open("a") as file:
            print(step, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), logs, file=file)


@pytest.mark.slow
@pytest.mark.fault("20,000 steps with flat memory and open files")
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_and_open_files_stay_flat_over_20_000_steps(tmp_path, record_property):
    folder = tmp_path / "run"
    assert finish(start(folder, images(20_000), fault=measure_myself, save_every_s=5.0), 3500) == 0
    rows = [tuple(map(int, line.split())) for line in folder.with_suffix(".measured").read_text().splitlines()]
    warm, last = rows[3], rows[-1]  # after 2,000 steps
    largest = max(row[1] for row in rows)
    record_property("measured", (
        f"steps {warm[0]} to {last[0]}: memory {warm[1] / 2**20:.1f} to {last[1] / 2**20:.1f} MiB, at most "
        f"{largest / 2**20:.1f}; open files {warm[2]} to {last[2]}; logs {last[3] / 2**20:.2f} MiB"))
    assert last[1] - warm[1] < 8 * 2**20
    assert {row[2] for row in rows} == {warm[2]}
    assert last[3] < 250 * 20_000 / LOG_EVERY  # bytes a line
