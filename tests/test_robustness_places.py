"""What a job leaves names no folder, user or host: records, checkpoints, figures, the metadata of pictures included."""

import socket

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from test_cells import SMALL
from test_data import idx_bytes

from diffmoe import reproduce
from diffmoe.cells import load_rows
from diffmoe.config import from_dict, shareable
from diffmoe.train import CONFIGS

USER = "zaphod-beeblebrox"


def words(path):
    """Return a file's bytes, with the texts that a picture may hold compressed."""
    if path.suffix != ".png":
        return path.read_bytes()
    with Image.open(path) as image:
        return path.read_bytes() + repr(image.info).encode()


@pytest.mark.fault("a path, user or host in what a job leaves")
def test_a_main_job_leaves_no_path_user_or_host(tmp_path, monkeypatch):
    home = tmp_path / USER
    data = home / "images"
    data.mkdir(parents=True)
    digits = load_digits()
    (data / "train-images-idx3-ubyte").write_bytes(idx_bytes((digits.images * 15).astype(np.uint8)))
    (data / "train-labels-idx1-ubyte").write_bytes(idx_bytes(digits.target.astype(np.uint8)))
    for name, value in (("HOME", str(home)), ("USER", USER), ("LOGNAME", USER)):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(home)
    monkeypatch.setattr(reproduce, "RESULTS", home / "results")
    rows = home / "rows.yaml"
    rows.write_text(f"- {{row: diffmoe, label: DiffMoE, system: diffmoe, config: {CONFIGS / 'diffmoe.yaml'}}}\n")
    command = ["--rows", str(rows), "--seeds", "1", "--jobs", "1", *SMALL, "data.name=idx", f"data.path={data}"]
    assert reproduce.main(command) == 0
    assert reproduce.main(["--rows", str(rows), "--publish"]) == 0
    left = [path for path in (home / "results").rglob("*")
            if path.is_file() and path.name != "config.yaml"]  # which is the user's own
    kinds = {path.suffix for path in left}
    assert {".json", ".safetensors", ".png", ".md"} <= kinds
    for path in left:
        content = words(path)
        for secret in (USER, str(tmp_path), str(CONFIGS.parents[1]), socket.gethostname()):
            assert len(secret) < 4 or secret.encode() not in content, (path, secret)


def test_a_shareable_configuration_is_a_configuration_without_places():
    (row, *_) = load_rows(CONFIGS.parents[1] / "baselines" / "table1.yaml", CONFIGS / "digits.yaml",
                          ["data.path=/home/me", "data.cache=/home/me", "evaluation.extractor_weights=/home/me/w.pth"])
    assert "/home/me" not in repr(shareable(row.config))
    assert from_dict(type(row.config), shareable(row.config)).training == row.config.training
