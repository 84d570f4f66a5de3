"""README, executed: every command at a tiny size, the Python block, the worked example, the links, the table."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import diffmoe.moe.routing as routing_module
from diffmoe import train
from diffmoe.moe.routing import Router, Routing
from diffmoe.report import readme

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = ".venv/bin/python -m diffmoe."
TRAINING = "training.batch_size=16 training.num_images=32 sampling.num_steps=1"
MEASURING = "--cache {tmp}/cache sampling.num_steps=1 evaluation.num_samples=20 evaluation.kid_subset_size=10"
ENTRIES = {  # the beginning of a command -> what makes it tiny; the longest beginning counts
    "make reproduce-table1": "", "make test": "", "make mlflow-ui": "", "make publish": "", "make check-results": "",
    PYTHON + "sample": "--out {tmp}/samples.png --seeds 0-9 sampling.num_steps=1",
    PYTHON + "train --help": "",
    PYTHON + "train --dry-run": "",
    PYTHON + "train --track": "--out {tmp}/tracked --track= " + TRAINING,  # off; test_live_tracking.py has it on
    PYTHON + "train --config": "--out {tmp}/race " + TRAINING,
    PYTHON + "train data.name=folder": "--out {tmp}/folder model.input_size=8 " + TRAINING,
    PYTHON + "evaluate --weights": MEASURING,
    PYTHON + "evaluate --run": MEASURING,
    PYTHON + "verify": "",
    ".venv/bin/python -m ablations.sweep": "--dry-run --out {tmp}/ablations",
    PYTHON + "reproduce": "--dry-run --out {tmp}/table",
}


def blocks(language: str) -> list[str]:
    """Return README's blocks of a language, without the indentation that they have in a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", README, re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


COMMANDS = [re.sub(r"\s+#.*", "", line) for text in blocks("bash") for line in text.splitlines() if line]


def entry_of(command: str) -> str:
    """Return what makes a command tiny."""
    known = [beginning for beginning in ENTRIES if command.startswith(beginning)]
    assert known, f"README's command has no entry in this test: {command}"
    return ENTRIES[max(known, key=len)]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an image folder `FOLDER`, two classes of 16 pictures of 8x8."""
    tmp = tmp_path_factory.mktemp("readme")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        folder = tmp / "FOLDER" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{number}.png")
    return tmp


@pytest.fixture(scope="module")
def trained(tmp: Path) -> Path:
    """Return a finished run on those pictures."""
    assert train.main(["--out", str(tmp / "RUN"), "data.name=folder", f"data.path={tmp / 'FOLDER'}",
                       "model.in_channels=3", "model.num_classes=2", *TRAINING.split()]) == 0
    return tmp / "RUN"


def call(command: str, tmp: Path) -> int:
    """Run a command of ours in this process and return its exit code."""
    module, *arguments = shlex.split(command.removeprefix(".venv/bin/python -m "))
    arguments += entry_of(command).format(tmp=tmp).split()
    arguments = [argument.replace("FOLDER", str(tmp / "FOLDER")) for argument in arguments]
    arguments = [str(tmp / "RUN") if argument == "RUN" else argument for argument in arguments]
    if "tests/golden/*.npz" in arguments:
        arguments[arguments.index("tests/golden/*.npz")] = "tests/golden/dense.npz"
    if "cuda" in arguments and not torch.cuda.is_available():
        arguments[arguments.index("cuda")] = "cpu"
    try:
        return importlib.import_module(module).main(arguments)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("command", [command for command in dict.fromkeys(COMMANDS) if not command.startswith("make ")])
def test_a_command_works(command: str, tmp: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    before = set(Path("results").rglob("*")) | set(Path().glob("*"))
    assert call(command, tmp) == 0
    assert set(Path("results").rglob("*")) | set(Path().glob("*")) == before


@pytest.mark.parametrize("command", [command for command in dict.fromkeys(COMMANDS) if command.startswith("make ")])
def test_a_make_target_exists_and_calls_modules_that_exist(command: str, tmp: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    entry_of(command)
    monkeypatch.chdir(ROOT)
    run = subprocess.run(["make", "-n", *shlex.split(command)[1:]], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    modules = re.findall(r"-m ([\w.]+)", run.stdout)
    assert all(importlib.util.find_spec(module) for module in modules) and {*modules} - {"venv"}
    for line in run.stdout.splitlines():
        if "diffmoe.reproduce" in line and "--publish" not in line and "--scale digits" in line:
            assert call(line, tmp) == 0


def test_one_command_works_as_a_process_of_its_own(tmp: Path) -> None:
    [command] = [command for command in COMMANDS if command == PYTHON + "train --dry-run"]
    run = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "parameters" in run.stdout, run.stderr


def test_a_command_without_an_entry_fails() -> None:
    with pytest.raises(AssertionError, match="no entry"):
        entry_of(PYTHON + "train --new-option")
    assert len(COMMANDS) >= 18


def test_the_python_block_runs() -> None:
    [text] = blocks("python")
    names: dict[str, object] = {}
    exec(compile(text, "README.md", "exec"), names)
    assert names["prediction"].shape == (2, 2, 8, 8)


def test_the_worked_example_trains(tmp: Path) -> None:
    [text] = blocks("yaml")
    (tmp / "router.yaml").write_text(text)
    named = re.search(r"\(`(baselines/configs/\w+\.yaml)`\)", README)[1]
    assert yaml.safe_load((ROOT / named).read_text()) == yaml.safe_load(text)
    assert train.main(["--config", str(train.CONFIGS / "digits.yaml"), "--config", str(tmp / "router.yaml"),
                       "--out", str(tmp / "example"), *TRAINING.split()]) == 0
    assert (tmp / "example" / "ema.safetensors").is_file() and (tmp / "example" / "samples.png").is_file()


def test_the_worked_example_names_what_exists() -> None:
    section = README.split("## Add a router")[1].split("\n## ")[0]
    words = set(re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```$", "", section, flags=re.DOTALL | re.MULTILINE)))
    known = {*Routing.__dataclass_fields__, *vars(Router), *vars(routing_module),
             *(f"Routing.{name}" for name in vars(Routing)), *inspect.signature(Routing.from_mask).parameters,
             *inspect.signature(Router.forward).parameters}
    unknown = {word for word in words if word not in known and not (ROOT / word).exists()}
    assert unknown == set()
    assert {"Router", "Routing.from_mask", "row_bound", "observed", "update", "losses", "Config"} <= words


def test_links_and_paths_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link]
    tops = "|".join(("diffmoe", "baselines", "results/digits", "tests"))
    paths = re.findall(rf"`((?:{tops})/[\w./-]*)`", README)
    assert len(links) >= 2 and len(paths) >= 8
    missing = [path for path in {*links, *paths} if not (ROOT / path).exists() and "/local" not in path]
    assert missing == []


def test_the_blocks_equal_their_files() -> None:
    assert "<!-- include results/digits/table.md -->" in README
    for path in (ROOT / "README.md", *(ROOT / "results").rglob("README.md")):
        text = path.read_text(encoding="utf-8")
        assert readme.fill(text, ROOT) == text, f"{path}: run python -m diffmoe.report.readme"


def test_a_block_is_filled_checked_and_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "before\n<!-- include table.md -->\n<!-- end -->\nafter\n"
    Path("README.md").write_text(text)
    Path("table.md").write_text("| a \\1 |\n")
    assert readme.main(["--check"]) == 1
    assert readme.main([]) == 0 and readme.main(["--check"]) == 0
    assert Path("README.md").read_text() == text.replace("-->\n<!-- end", "-->\n\n| a \\1 |\n\n<!-- end")
    page = Path("results", "scale", "README.md")
    page.parent.mkdir(parents=True)
    page.write_text(text)
    assert readme.main(["--check"]) == 1
    assert readme.main([]) == 0 and page.read_text() == Path("README.md").read_text()
    Path("table.md").unlink()
    assert readme.main(["--check"]) == 1
    assert readme.main([]) == 0 and Path("README.md").read_text() == page.read_text() == text
