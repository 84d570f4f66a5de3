# ruff: noqa: E501 (inputs are clearer unbroken)
"""Whatever a file or a command line holds: it is read, or it is one clear line. Never a traceback, a hang or code run.

`FUZZ_EXAMPLES` are tried of each reader, by default the same few hundred; `make soak` tries other ones each round.
"""

import gzip
import io
import json
import os
import pickle
import struct
import urllib.error
import zipfile
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import model_config, one_line, run_config, run_data
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from torchvision.datasets import CIFAR10

from diffmoe import sample, train
from diffmoe.cli import run_command
from diffmoe.config import ConfigError, DataConfig, load_config, to_dict
from diffmoe.data import load_data
from diffmoe.data.idx import read_idx
from diffmoe.training.checkpoint import load_weights, save_weights
from diffmoe.verify import load_fixture

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
MAX_MESSAGE = 1500
tried: Counter = Counter()

fuzz = settings(max_examples=EXAMPLES, deadline=timedelta(seconds=10), database=None, derandomize="FUZZ_EXAMPLES" not in os.environ,
                suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def count(record_property):
    tried.clear()
    yield
    record_property("survived", tried.total())
    print(dict(tried))


def accepts_or_refuses(call):
    """Read an input; all that may be raised is one clear line."""
    try:
        call()
        tried["read"] += 1
    except ConfigError as error:
        assert len(one_line(error)) <= MAX_MESSAGE
        tried["refused"] += 1


@st.composite
def damaged(draw, *contents):
    """Draw some bytes, or good ones with some replaced, inserted, taken out or cut off."""
    content = bytearray(draw(st.sampled_from([*contents, b""])))
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 4]))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.sampled_from([0, 1, 1, 4, 1000])))
        content[start:stop] = draw(st.one_of(st.binary(max_size=8), st.sampled_from(
            [b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"9" * 30, content[:stop]])))
    return bytes(content)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "file"


# ---------------------------------------------------------------- configurations

YAML = yaml.safe_dump(run_data()).encode()
NASTY = ["1e400", "-.inf", ".nan", "9" * 400, "9" * 5000, "2024-13-45", "1:99:99", "!!binary x", "!!int ''", "!!float x",
         "!!python/object/apply:os.abort []", "!!timestamp x", "!!set {a}", "{{}: 1}", "? [a]\n: b", "[" * 500,
         "{a: " * 300, "=", "<<: 1", "{<<: [1]}", "&a [*a]", "&a {model: *a}", "null", "~", "'\\0'", "\"\\0\"", "a" * 3000,
         "-0", "0x10", "1_0", "yes", "\t", "@", "os:system", "diffmoe.moe.expert_choice:ExpertChoice", "diffmoe:..", ":",
         "a..b:c", "this_module_is_not_here:X", "{<<: {a: 1}, <<: {b: 2}}", "*nothing", "--- 1\n--- 2", "%TAG ! x", "0b2",
         "0o9", "1e", "!!null x", "!!omap [a]"]
LAUGHS = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]) + "\nmodel: *a11\n"
PLAIN = st.recursive(st.none() | st.booleans() | st.integers(0, 8) | st.integers() | st.floats() | st.text(max_size=4),
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3))
VALUES = st.one_of(st.sampled_from(NASTY), st.integers(0, 8).map(str), st.text(max_size=12), st.integers().map(str), st.floats().map(str),
                   PLAIN.map(json.dumps))


def keys(node, path=""):
    """Yield the dotted keys of plain data."""
    for key, value in node.items():
        yield path + key
        if isinstance(value, dict):
            yield from keys(value, f"{path}{key}.")


DOTTED = st.sampled_from([*keys(to_dict(run_config())), "size", "model.size", "model.nothing"])
KEYS = DOTTED | st.text(max_size=8)


@pytest.mark.fault("fuzzed YAML")
@fuzz
@given(content=st.one_of(damaged(YAML, LAUGHS.encode()), VALUES.map(lambda text: text.encode("utf-8", "replace")),
                         st.builds(lambda key, value: yaml.safe_dump(run_data({key: value})).encode(), DOTTED, PLAIN)))
def test_yaml(file, content):
    file.write_bytes(content)
    accepts_or_refuses(lambda: load_config([file]))


@pytest.fixture(scope="module")
def base(file):
    path = file.with_name("base.yaml")
    path.write_bytes(YAML)
    return path


OVERRIDES = st.lists(st.one_of(st.builds(lambda key, value: f"{key}={value}", KEYS, VALUES), st.text(max_size=20)),
                     max_size=3)


@pytest.mark.fault("fuzzed overrides")
@fuzz
@given(overrides=OVERRIDES)
@example(overrides=["model=&a {model: *a}"] * 2)
def test_overrides(base, overrides):
    accepts_or_refuses(lambda: load_config([base, base], overrides))


@pytest.mark.fault("fuzzed command line")
@fuzz
@given(arguments=st.lists(st.one_of(OVERRIDES.map(lambda some: some[0] if some else ""), st.sampled_from(
    ["--seed", "--seed=1", "--seed=x", "--config", "--out", "--", "-h", "--dry-run=1", "--nothing", "training.batch_size=0"]),
    st.text(max_size=8)), max_size=3))
def test_command_line(base, monkeypatch_module, capture, arguments):
    monkeypatch_module.setattr("sys.argv", ["train", "--dry-run", "--config", str(base), *arguments])
    monkeypatch_module.setattr(train, "describe", lambda config: "")  # counts a model of any size
    try:
        code = run_command(train.main)
    except SystemExit as stop:  # argparse's
        code = stop.code
    errors = capture()
    assert code in (0, 2)
    if code == 2:
        assert "error: " in errors and "Traceback" not in errors
    tried["read" if code == 0 else "refused"] += 1


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
def capture(capsys):
    return lambda: capsys.readouterr().err


# ---------------------------------------------------------------- data

def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


IDX = idx(np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4))


@pytest.mark.fault("fuzzed idx file")
@fuzz
@given(content=damaged(IDX, idx(np.zeros(5, np.uint8)), gzip.compress(IDX, mtime=0)), packed=st.booleans(),
       num_dims=st.sampled_from([1, 3]))
def test_idx(file, content, packed, num_dims):
    path = file.with_name("file.gz" if packed else "file.idx")
    path.write_bytes(content)
    accepts_or_refuses(lambda: read_idx(path, num_dims))


def images():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 2**16, (8, 8), np.uint16))
    rgb = Image.fromarray(pixels[..., :3])
    for image, kind, options in [
            (rgb, "PNG", {}), (rgb, "JPEG", {}), (rgb, "WEBP", {}), (rgb, "BMP", {}), (wide, "PNG", {}),
            (Image.fromarray(pixels).convert("CMYK"), "JPEG", {}), (rgb.convert("P"), "PNG", {}),
            (rgb, "PNG", {"save_all": True, "append_images": [rgb]}), (rgb.convert("1"), "BMP", {})]:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        yield buffer.getvalue()


@pytest.mark.fault("fuzzed image")
@fuzz
@given(content=damaged(*images()), channels=st.sampled_from([1, 3]))
def test_images(file, content, channels):
    path = file.with_name("images") / "class" / "0.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    model = model_config(None, num_classes=1, in_channels=channels)
    config = DataConfig(name="folder", path=str(path.parents[1]), resize=True)
    accepts_or_refuses(lambda: load_data(config, model))


class Bomb:
    """Unpickles to a file that shows it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


BOMBED = Path(os.environ.get("TMPDIR", "/tmp")) / f"diffmoe-fuzz-{os.getpid()}"
PICKLE = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]})


@pytest.mark.fault("fuzzed CIFAR file")
@fuzz
@given(content=damaged(PICKLE, pickle.dumps(Bomb(BOMBED))), name=st.sampled_from(["data_batch_1", "batches.meta"]))
def test_cifar_cache(file, monkeypatch_module, content, name):
    def offline(*arguments, **options):
        raise urllib.error.URLError("no network")

    monkeypatch_module.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    folder = file.with_name("cifar") / CIFAR10.base_folder
    folder.mkdir(parents=True, exist_ok=True)
    for each in ("data_batch_1", "data_batch_2", "batches.meta"):
        (folder / each).write_bytes(content if each == name else PICKLE)
    config = DataConfig(name="cifar10", cache=str(folder.parent))
    accepts_or_refuses(lambda: load_data(config, model_config(None)))
    assert not BOMBED.exists()


# ---------------------------------------------------------------- fixtures and checkpoints

def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy_header(text):
    """Return an npz whose only array has this header."""
    buffer, header = io.BytesIO(), text.encode("latin1", "replace")
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    return buffer.getvalue()


HEADERS = ["{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999,), }\n", "{'descr': '|O', 'fortran_order': False, "
           "'shape': (1,), }\n", "{'descr': '<U9', 'fortran_order': False, 'shape': (), }\n", "[" * 300, "{'shape': (-1,)}\n",
           "__import__('os').abort()\n"]


@pytest.mark.fault("fuzzed npz file")
@fuzz
@given(content=st.one_of(damaged(npz(a=np.arange(6.0), b=np.array(3)), npz(a=np.array([Bomb(BOMBED)], object)),
                                 pickle.dumps(Bomb(BOMBED))),
                         st.one_of(st.sampled_from(HEADERS), st.text(max_size=80)).map(npy_header)))
def test_npz(file, content):
    file.write_bytes(content)
    accepts_or_refuses(lambda: load_fixture(file))
    assert not BOMBED.exists()


def checkpoint_bytes(folder):
    path = folder / "base.safetensors"
    save_weights(path, {"a": torch.arange(6.0).view(2, 3)}, {"config": run_data(), "step": 3})
    return path.read_bytes()


@pytest.fixture(scope="module")
def checkpoint(file):
    return checkpoint_bytes(file.parent)


DESCRIPTIONS = st.one_of(
    st.just({}), st.just([]), st.just(["", {}]), st.just([None, []]), st.just([None, {"config": 3}]),
    VALUES, st.builds(lambda key, value: [None, {"config": run_data({key: value} if key else {})}],
                      st.sampled_from(["", "model.hidden_size", "model.moe", "data.name", "model.moe.router"]),
                      st.one_of(st.none(), st.integers(), st.text(max_size=5), st.floats(), st.just({}))))


@pytest.mark.fault("fuzzed checkpoint")
@pytest.mark.parametrize("read", [load_weights, lambda file: sample.load_trained(file, [])],
                         ids=["weights", "trained"])
@fuzz
@given(data=st.data())
def test_checkpoints(file, checkpoint, read, data):
    crafted = DESCRIPTIONS.map(lambda value: save(
        {"a": torch.zeros(2)}, {"description": value if isinstance(value, str) else json.dumps(value)}))
    file.write_bytes(data.draw(st.one_of(damaged(checkpoint), crafted)))
    accepts_or_refuses(lambda: read(file))
