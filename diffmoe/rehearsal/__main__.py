"""Rehearse the paper's scale on small data: every command that a lab would give, on the GPUs of this machine.

    python -m diffmoe.rehearsal        do all of it; the record and its page go to results/rehearsal/local

Pictures become latents; one process, DDP and FSDP2 train with the same losses; of several processes one is killed, and
one process finishes their run; guided samples are measured by ADM's definitions. Pictures, autoencoder and Inception
are made here, without training: no distance means anything. Interrupted, the same command goes on with the next step.
Without a GPU a tiny network does the same in two processes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from diffmoe.bench.cases import own_pools
from diffmoe.bench.scaling_report import TARGETS
from diffmoe.cli import choose_device, run_command
from diffmoe.config import ConfigError, load_config, require
from diffmoe.launch import command, run_module, variables
from diffmoe.records import environment, write_record
from diffmoe.rehearsal.materials import CLASSES, FACTOR, make_images, make_inception, make_reference, make_vae
from diffmoe.rehearsal.report import SHOWN, TABLE, Check, Rehearsal, write_report
from diffmoe.train import CONFIGS

LOCAL = Path("results/rehearsal/local")
SYSTEM = [CONFIGS / "imagenet256.yaml", CONFIGS / "diffmoe.yaml"]
LOSS_TOLERANCE, MEAN_TOLERANCE = 1e-4, 5e-3
LAST = 1 / 3
"""Share of a bf16 run over which its loss is averaged."""
LEFT_WITHIN_S = 60.0
EFFICIENCY = TARGETS[2]
"""Of weak scaling by DDP where each GPU does what one alone does; with a pool over all, and by FSDP2, it is shown."""
CHECKPOINT_WITHIN_S = 300.0
"""Longest wait for a checkpoint to go on from; one is written every minute."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a rehearsal is made of on a kind of device."""

    images: int
    side: int
    vae_width: int
    model: tuple[str, ...]
    batch: int
    bf16_steps: int
    run_steps: int
    samples: int


SIZES = {
    "cuda": Size(images=2000, side=256, vae_width=32, model=("model.size=B",), batch=256, bf16_steps=300,
                 run_steps=2000, samples=200),
    "cpu": Size(images=100, side=64, vae_width=8, model=("model.size=nano", "model.moe.num_experts=4"), batch=16,
                bf16_steps=30, run_steps=3000, samples=20),
}


class Steps:
    """The steps of a rehearsal in one folder; what a step leaves there is not done again.

    Args:
        work: the folder.
        device: the kind that is rehearsed on.
        processes: of the runs by several.
    """

    def __init__(self, work: Path, device: torch.device, processes: int) -> None:
        self.work, self.processes, self.size = work.resolve(), processes, SIZES[device.type]
        self.checks: list[Check] = []
        self.images, self.vae = self.work / "images", self.work / "vae"
        self.latents, self.run = self.work / "latents", self.work / "run"
        self.reference, self.inception = self.work / "reference.npz", self.work / "inception.pth"
        self.settings = [*self.size.model, f"model.input_size={self.size.side // FACTOR}",
                         f"model.num_classes={CLASSES}", f"data.path={self.latents}", f"data.vae={self.vae}",
                         f"runtime.device={device.type}"]

    def materials(self) -> None:
        """Make pictures, autoencoder, reference batch and Inception."""
        if not self.inception.exists():
            shutil.rmtree(self.images, ignore_errors=True)
            make_images(self.images, self.size.images, self.size.side)
            make_vae(self.vae, self.size.vae_width)
            make_reference(self.images, self.reference)
            make_inception(self.inception)

    def encode(self) -> None:
        """Encode the pictures by all processes, and compare every byte with its checksum."""
        self._command("latents", "diffmoe.data.latents", "--images", self.images, "--vae", self.vae, "--out",
                      self.latents, "--size", self.size.side, "--shard-images", 64, processes=self.processes)
        self._command("latents-check", "diffmoe.data.latents", "--check", self.latents)
        self.checks.append(Check("latents: every byte has its checksum", 1.0, ">= 1", ok=True))

    def compare(self) -> list[dict[str, Any]]:
        """Train alone, by DDP and by FSDP2, and compare the losses; then with pools and batches of a process."""
        batch, steps = self.size.batch, self.size.bf16_steps
        fp32 = {name: self._losses(f"fp32 {name}", name, 20, batch // 2, "training.precision=fp32",
                                   "runtime.compile=false") for name in ("alone", "ddp", "fsdp")}
        bf16 = {name: self._losses(f"bf16 {name}", name, steps, batch) for name in ("alone", "ddp", "fsdp")}
        cut = {"ddp": self._losses("bf16 ddp, a pool each", "ddp", steps, batch, *own_pools(batch // self.processes))}
        wide = {"ddp with pools of a process": self._losses(
            "bf16 ddp, a batch and a pool each", "ddp", steps // 3, batch * self.processes, *own_pools(batch))}
        wide |= {name: self._losses(f"bf16 {name}, a batch each", name, steps // 3, batch * self.processes)
                 for name in ("ddp", "fsdp")}
        apart = max(run["sums_apart"] for runs in (fp32, bf16, cut, wide) for how, run in runs.items() if "ddp" in how)
        self._at_most("ddp: distance of the sums of the processes' weights", apart, 0)
        for name in ("ddp", "fsdp"):
            difference = max(abs(mine / one - 1) for mine, one in
                             zip(fp32[name]["losses"], fp32["alone"]["losses"], strict=True))
            self._at_most(f"fp32, {name}: largest relative difference of a loss", difference, LOSS_TOLERANCE)
            self._at_most(f"bf16, {name}: relative difference of the last losses' mean",
                          self._difference(bf16[name], bf16["alone"]), MEAN_TOLERANCE)
        if self.processes <= torch.cuda.device_count():
            for how, run in wide.items():
                found = run["images_per_second"] / self.processes / bf16["alone"]["images_per_second"]
                alike = "pools of a process" in how  # each GPU does what one alone does, and not more
                limit = f">= {EFFICIENCY}" if alike else SHOWN
                self.checks.append(Check(f"weak scaling, {how}: efficiency", found, limit,
                                         ok=found >= EFFICIENCY or not alike))
        self.checks.append(Check("bf16, ddp with pools of a process: relative difference of the last losses' mean",
                                 self._difference(cut["ddp"], bf16["alone"]), SHOWN, ok=True))
        return [{key: value for key, value in run.items() if key not in ("losses", "sums_apart")}
                for runs in (fp32, bf16, cut, wide) for run in runs.values()]

    def kill_and_resume(self) -> None:
        """Train by all processes, kill the main one behind a checkpoint, and finish alone."""
        note = self.work / "killed.json"
        train = ["diffmoe.train", *self._configs(), "--out", self.run, *self.settings,
                 f"training.batch_size={self.size.batch}",
                 f"training.num_images={self.size.run_steps * self.size.batch}"]
        if not note.exists():
            with (self.work / "killed.log").open("w") as log:
                job = subprocess.Popen(command(*train, processes=self.processes), stdout=log, stderr=log,
                                       env=variables())
                step = self._wait_for_checkpoint(job)
                os.kill(int((self.run / "lock").read_text()), signal.SIGKILL)
                killed = time.monotonic()
                code = job.wait()
            note.write_text(json.dumps({"step": step, "seconds": time.monotonic() - killed, "code": code,
                                        "log": (self.run / "losses.jsonl").read_text()}))
        found = json.loads(note.read_text())
        self._at_most("killed process: seconds until the others had left", found["seconds"], LEFT_WITHIN_S)
        self.checks.append(Check("killed process: the job failed", float(found["code"]), "!= 0", ok=found["code"] != 0))
        self._command("resumed", *train)
        before, after = ([json.loads(line) for line in text.splitlines() if line.endswith("}")]
                         for text in (found["log"], (self.run / "losses.jsonl").read_text()))
        kept = [line for line in before if line["step"] <= found["step"]]
        self.checks.append(Check("resumed alone from the checkpoint of step", float(found["step"]), "> 0",
                                 ok=found["step"] > 0 and after[: len(kept)] == kept))
        self.checks.append(Check("resumed alone until step", float(after[-1]["step"]), f">= {self.size.run_steps}",
                                 ok=after[-1]["step"] >= self.size.run_steps))

    def measure(self) -> dict[str, float]:
        """Draw guided samples and measure them against the reference batch by ADM's definitions."""
        result = self.work / "metrics.json"
        self._command("metrics", "diffmoe.evaluate", "--run", self.run, "--json", result, "sampling.guidance_scale=1.5",
                      "sampling.num_steps=10", f"sampling.batch_size={min(self.size.samples, 100)}",
                      f"evaluation.num_samples={self.size.samples}", "evaluation.kid_subset_size=10",
                      f"evaluation.reference={self.reference}", f"evaluation.extractor_weights={self.inception}",
                      f"data.path={self.latents}", f"data.vae={self.vae}")
        metrics = json.loads(result.read_text())["metrics"]
        self.checks.append(Check("guided samples: metrics by ADM's definitions that are finite", float(len(metrics)),
                                 ">= 7", ok=len(metrics) >= 7 and all(map(math.isfinite, metrics.values()))))
        return metrics

    def _difference(self, run: dict[str, Any], other: dict[str, Any]) -> float:
        """Return how far the mean of a run's last losses is from another's, relative to that."""
        ours, theirs = (statistics.fmean(each["losses"][-int(LAST * self.size.bf16_steps):]) for each in (run, other))
        return abs(ours / theirs - 1)

    def _losses(self, name: str, parallel: str, steps: int, batch: int, *overrides: str) -> dict[str, Any]:
        """Train some steps as `diffmoe.rehearsal.losses` does; return what it wrote, with its name and batch."""
        path = self.work / f"{name.replace(',', '').replace(' ', '-')}.json"
        alone = parallel == "alone"
        self._command(path.stem, "diffmoe.rehearsal.losses", *self._configs(), "--steps", steps, "--json", path,
                      *self.settings, f"training.batch_size={batch}", f"training.num_images={batch * steps}",
                      *([] if alone else [f"runtime.parallel={parallel}"]), *overrides,
                      processes=1 if alone else self.processes)
        return {"name": name, "batch": batch} | json.loads(path.read_text())

    def _wait_for_checkpoint(self, job: subprocess.Popen[bytes]) -> int:
        """Wait until the run has a checkpoint behind its start, and return its step.

        Raises:
            ConfigError: when the job ends before, or takes too long.
        """
        until = time.monotonic() + CHECKPOINT_WITHIN_S
        while job.poll() is None and time.monotonic() < until:
            steps = [int(path.stem.rpartition("-")[2]) for path in self.run.glob("checkpoint-*.safetensors")]
            if max(steps, default=0) > 0:
                return max(steps)
            time.sleep(0.5)
        job.terminate()
        raise ConfigError(f"{self.work / 'killed.log'}: no checkpoint before the run's end; see there why")

    def _at_most(self, name: str, found: float, limit: float) -> None:
        self.checks.append(Check(name, found, f"<= {limit:g}", ok=found <= limit))

    @staticmethod
    def _configs() -> list[str]:
        return [part for path in SYSTEM for part in ("--config", str(path))]

    def _command(self, name: str, *arguments: object, processes: int = 1) -> None:
        """Run a module of this package, unless it succeeded before; what it says goes to `<name>.log`.

        Raises:
            ConfigError: when it fails.
        """
        done, log = self.work / f"{name}.done", self.work / f"{name}.log"
        if done.exists():
            return
        print(f"{name} ...", flush=True)
        code = run_module(log, *arguments, processes=processes)
        if code:
            raise ConfigError(f"{name}: exit code {code}; {log} says why, and the same command goes on from here")
        done.touch()


def rehearse(work: Path, out: Path, device: torch.device, processes: int) -> Rehearsal:
    """Do what is left to do in `work`, and write the record into `out`.

    Raises:
        ConfigError: when a command fails.
    """
    work.mkdir(parents=True, exist_ok=True)
    steps = Steps(work, device, processes)
    started = datetime.now(UTC)
    steps.materials()
    steps.encode()
    runs = steps.compare()
    steps.kill_and_resume()
    metrics = steps.measure()
    config = load_config(SYSTEM, steps.settings)
    record = Rehearsal(id=f"rehearsal-{started:%Y%m%d-%H%M%S}", started=f"{started:%Y-%m-%d %H:%M} UTC",
                       environment=environment(device), processes=processes,
                       settings={"size": config.model.hidden_size, "experts": config.model.moe.num_experts,
                                 "bf16_steps": steps.size.bf16_steps, "run_steps": steps.size.run_steps},
                       checks=steps.checks, runs=runs, metrics=metrics)
    write_record(out / "records", record)
    return record


def main(arguments: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmoe.rehearsal", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=LOCAL, help=f"folder of records and of the work (default: {LOCAL})")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--processes", type=int, metavar="N", help="default: the GPUs here; 2 without any")
    options = parser.parse_args(arguments)
    device = choose_device(options.device)
    processes = options.processes or (torch.cuda.device_count() if device.type == "cuda" else 2)
    require(processes >= 2, "--processes", processes, "a rehearsal of several takes 2 or more GPUs")
    record = rehearse(options.out / f"work-{device.type}-{processes}", options.out, device, processes)
    write_report(options.out)
    print((options.out / TABLE).read_text())
    return 0 if all(check.ok for check in record.checks) else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
