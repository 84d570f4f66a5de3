"""Data sets: pixels arrive exactly, in one order, and whatever cannot be used is one line that names it."""

from __future__ import annotations

import gzip
import io
import os
import random
import struct
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from conftest import model_config, one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffmoe.config import ConfigError, DataConfig, load_config
from diffmoe.data import ImageData, load_data
from diffmoe.data.conversion import centre_crop
from diffmoe.data.idx import read_idx
from diffmoe.train import CONFIGS


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    image = image if mode is None else image.convert(mode)
    image.save(path, **options)
    return image


@pytest.fixture
def folder(tmp_path):
    """Three classes of two RGB images each, 8x8; the image of class c, number i has seed 2c + i."""
    for label, name in enumerate(("ant", "bee", "cow")):
        for index in range(2):
            save(tmp_path / "data" / name / f"{index}.png", pixels(8, 8, 3, seed=2 * label + index))
    return tmp_path / "data"


def load(path, *, name="folder", num_classes=3, in_channels=3, input_size=8, **options):
    model = model_config(None, num_classes=num_classes, in_channels=in_channels, input_size=input_size)
    return load_data(DataConfig(name=name, path=None if path is None else str(path), **options), model)


def failure(path, **options):
    with pytest.raises(ConfigError) as caught:
        load(path, **options)
    return one_line(caught.value)


# ---------------------------------------------------------------- image folders

def test_a_folder_gives_its_pixels_exactly_with_classes_and_images_sorted_by_name(folder):
    data = load(folder)
    expected = np.stack([pixels(8, 8, 3, seed=seed).transpose(2, 0, 1) for seed in range(6)])
    assert data.images.dtype == torch.uint8 and data.images.is_contiguous()
    assert np.array_equal(data.images, expected)
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2] and data.labels.dtype == torch.int64
    assert (data.name, data.num_classes) == ("folder", 3)


def test_the_order_is_that_of_the_names_not_of_the_file_system_or_the_threads(folder, monkeypatch):
    for index in range(2, 150):  # more than one piece of work for the threads
        save(folder / "bee" / f"{index}.png", pixels(8, 8, 3, seed=index + 10))
    expected = load(folder)
    scandir = os.scandir

    def shuffled(path):
        entries = list(scandir(path))
        random.Random(1).shuffle(entries)
        return iter(entries)

    monkeypatch.setattr(os, "scandir", shuffled)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    again = load(folder)
    assert torch.equal(again.images, expected.images) and torch.equal(again.labels, expected.labels)
    assert np.array_equal(again.images[2 + 1 + 1], pixels(8, 8, 3, seed=20).transpose(2, 0, 1))  # 0, 1, 10, ...


def test_hidden_and_other_files_are_passed_over_and_suffixes_may_be_capitals(folder):
    expected = load(folder).digest
    (folder / ".git").mkdir()
    (folder / "readme.txt").write_text("")
    (folder / "ant" / "._0.png").write_bytes(b"\0")
    (folder / "ant" / "Thumbs.db").write_bytes(b"\0")
    (folder / "ant" / "1.png").rename(folder / "ant" / "1.PNG")
    assert load(folder).digest == expected


def test_the_digest_moves_with_one_pixel_one_label_and_the_number_of_classes(folder):
    data = load(folder)
    pixel, label = data.images.clone(), data.labels.clone()
    pixel[3, 1, 4, 4] ^= 1
    label[0] = 1
    changed = [(pixel, data.labels, 3), (data.images, label, 3), (data.images, data.labels, 4)]
    digests = {data.digest, load(folder).digest, *(ImageData("folder", *content).digest for content in changed)}
    assert len(digests) == 4


def test_one_class_is_a_data_set(tmp_path):
    save(tmp_path / "all" / "0.png", pixels(8, 8, 3))
    assert load(tmp_path, num_classes=1).labels.tolist() == [0]


@pytest.mark.fault("16-bit, CMYK, palette, animated and other images")
@pytest.mark.parametrize("in_channels", [1, 3])
def test_every_kind_of_image_becomes_grey_or_rgb_as_documented(tmp_path, in_channels):
    rgb, grey = pixels(8, 8, 3), pixels(8, 8, seed=1)
    wide = np.random.default_rng(2).integers(0, 2**16, (8, 8), np.uint16)
    folder = tmp_path / "all"
    save(folder / "a-grey.png", grey)
    save(folder / "b-wide.png", wide)
    save(folder / "c-alpha.png", np.dstack([rgb, grey]))
    palette = save(folder / "d-palette.png", rgb, "P", transparency=3)
    binary = save(folder / "e-binary.png", grey, "1")
    save(folder / "f-animated.png", rgb, save_all=True, append_images=[Image.fromarray(255 - rgb)])
    save(folder / "g-animated.webp", rgb, save_all=True, append_images=[Image.fromarray(255 - rgb)], lossless=True)
    save(folder / "h.bmp", rgb)
    save(folder / "i-cmyk.jpg", np.dstack([rgb, grey]), "CMYK", quality=95)
    save(folder / "j.jpeg", np.full((8, 8, 3), (200, 100, 50), np.uint8), quality=100)
    images = load(tmp_path, num_classes=1, in_channels=in_channels).images.numpy()

    as_rgb = [np.dstack([grey] * 3), np.dstack([(wide // 256).astype(np.uint8)] * 3), rgb,
              np.asarray(palette.convert("RGB")), np.asarray(binary.convert("RGB")), rgb, rgb, rgb]
    weights = np.array([0.299, 0.587, 0.114])
    for image, expected in zip(images, as_rgb, strict=False):
        if in_channels == 3:
            assert np.array_equal(image, expected.transpose(2, 0, 1))
        else:
            assert np.abs(image[0] - expected @ weights).max() <= 1
    with Image.open(folder / "i-cmyk.jpg") as stored:
        cyan, magenta, yellow, black = np.asarray(stored).astype(float).transpose(2, 0, 1)
    if in_channels == 3:
        naive = [255 * (1 - ink / 255) * (1 - black / 255) for ink in (cyan, magenta, yellow)]
        assert np.abs(images[8] - np.stack(naive)).max() <= 2
        assert np.abs(images[9].astype(int) - np.array([200, 100, 50])[:, None, None]).max() <= 3


def test_a_folder_that_is_no_data_set_is_one_line_with_the_remedy(folder, tmp_path):
    assert "data.path=None" in failure(None)
    assert str(tmp_path / "missing") in failure(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in failure(tmp_path / "empty")
    assert str(folder / "ant" / "0.png") in failure(folder / "ant" / "0.png")
    assert f"the folder above, {folder}?" in failure(folder / "ant")
    message = failure(folder, num_classes=10)
    assert "model.num_classes=10" in message and "3 class folders" in message
    (folder / "dog").mkdir()
    assert "class folder dog" in failure(folder)
    assert "model.in_channels=4" in failure(folder, in_channels=4)


@pytest.mark.parametrize(("splits", "guess"), [(("test", "train"), "train"), (("a", "b"), "a")])
def test_a_folder_one_level_too_high_is_told_the_one_below(folder, tmp_path, splits, guess):
    root = tmp_path / "root"
    root.mkdir()
    folder.rename(root / splits[0])
    for name in ("ant", "bee", "cow"):
        save(root / splits[1] / name / "0.png", pixels(8, 8, 3))
    assert f"did you mean {root / guess}?" in failure(root)
    assert len(load(root / guess).images) > 0


def test_a_folder_without_permission_is_one_line(folder):
    if os.geteuid() != 0:
        os.chmod(folder / "bee", 0)
        message = failure(folder)
        os.chmod(folder / "bee", 0o700)
        assert str(folder / "bee") in message and "Permission denied" in message
        return
    os.chmod(folder, 0)
    os.seteuid(65534)
    try:
        message = failure(folder)
    finally:
        os.seteuid(0)
    assert str(folder) in message and "Permission denied" in message


def broken_images():
    with_noise = pixels(64, 64, 3)

    def encoded(suffix, cut):
        buffer = io.BytesIO()
        Image.fromarray(with_noise).save(buffer, suffix)
        return buffer.getvalue()[:cut]

    return {"empty.png": b"", "text.jpg": b"no image", "cut.png": encoded("PNG", 2000),
            "cut.jpg": encoded("JPEG", 2000), "cut.webp": encoded("WEBP", 500), "cut.bmp": encoded("BMP", 5000),
            "header.png": encoded("PNG", 20),
            "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"}


@pytest.mark.fault("an image that is empty, cut off or none")
@pytest.mark.parametrize("name", broken_images())
def test_a_broken_image_is_one_line_that_names_the_file(folder, name):
    (folder / "bee" / name).write_bytes(broken_images()[name])
    message = failure(folder, resize=True)
    assert str(folder / "bee" / name) in message and "broken image" in message


def test_of_several_broken_images_the_first_in_order_is_named(folder):
    for name in ("cow", "bee"):
        (folder / name / "9.png").write_bytes(b"")
    assert str(folder / "bee" / "9.png") in failure(folder)


def test_an_image_that_cannot_be_opened_is_one_line(folder):
    (folder / "bee" / "5.png").symlink_to(folder / "nowhere.png")
    message = failure(folder)
    assert str(folder / "bee" / "5.png") in message and "No such file" in message


@pytest.mark.fault("an image {width} pixels wide and high")
@pytest.mark.parametrize("width", [10_000, 30_000])
@pytest.mark.filterwarnings("ignore")
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(folder, width):
    bomb = folder / "bee" / "bomb.bmp"  # a header alone: PIL warns at 1e8 pixels and raises at 9e8
    bomb.write_bytes(b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, width, 1, 24,
                                                                              0, 0, 0, 0, 0, 0))
    message = failure(folder, resize=True)
    assert str(bomb) in message and str(Image.MAX_IMAGE_PIXELS) in message


@pytest.mark.fault("an image 30000 pixels wide and one high")
def test_an_image_too_thin_to_scale_is_refused(folder):
    save(folder / "bee" / "line.png", pixels(1, 30_000))
    message = failure(folder, resize=True, input_size=256)
    assert "30000x1" in message and "line.png" in message


# ---------------------------------------------------------------- sizes

def test_another_size_is_refused_with_both_sizes_unless_it_may_be_resized(folder):
    save(folder / "bee" / "2.png", pixels(9, 12, 3))
    message = failure(folder)
    for part in (str(folder / "bee" / "2.png"), "12x9", "8x8", "data.resize"):
        assert part in message
    kept, resized = load(folder, resize=True).images[:4], load(folder, resize=True).images[4]
    assert np.array_equal(kept[3], pixels(8, 8, 3, seed=3).transpose(2, 0, 1))
    assert resized.shape == (3, 8, 8)


def cubic_matrix(old, new):
    """Return bicubic weights (new, old), a = -0.5, widened by the scale when shrinking."""
    scale = old / new
    distance = np.abs((np.arange(new) + 0.5)[:, None] * scale - (np.arange(old) + 0.5)) / max(scale, 1)
    near, far = distance < 1, (distance >= 1) & (distance < 2)
    weights = (near * (1.5 * distance**3 - 2.5 * distance**2 + 1)
               + far * (-0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("height", "width"), [(20, 34), (34, 20), (8, 8), (9, 12), (5, 7), (64, 40), (16, 16)])
def test_the_crop_is_adms_box_halving_one_bicubic_step_and_the_centre_square(height, width):
    size = 8
    image = pixels(height, width)
    expected = image.astype(float)
    while min(expected.shape) >= 2 * size:
        h, w = expected.shape[0] // 2, expected.shape[1] // 2
        expected = expected[: 2 * h, : 2 * w].reshape(h, 2, w, 2).mean((1, 3))
    h, w = expected.shape
    scale = size / min(h, w)
    expected = cubic_matrix(h, round(h * scale)) @ expected @ cubic_matrix(w, round(w * scale)).T
    top, left = (expected.shape[0] - size) // 2, (expected.shape[1] - size) // 2
    expected = expected[top : top + size, left : left + size].clip(0, 255)
    actual = np.asarray(centre_crop(Image.fromarray(image), size))
    assert actual.shape == (size, size)
    assert np.abs(actual - expected).max() <= 2.5  # PIL rounds to 8 bits after each pass and clips between them


# ---------------------------------------------------------------- idx files

def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


IMAGES, LABELS = pixels(6, 8, 8), np.array([0, 2, 1, 0, 2, 1], np.uint8)


@pytest.fixture
def idx_folder(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(IMAGES))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS))
    return tmp_path


def load_idx(path, in_channels=1, **options):
    return load(path, name="idx", in_channels=in_channels, **options)


def test_idx_files_give_their_pixels_and_labels_plain_or_gzipped_under_either_name(idx_folder):
    plain = load_idx(idx_folder)
    assert np.array_equal(plain.images[:, 0], IMAGES) and plain.labels.tolist() == LABELS.tolist()
    for old, new in (("train-images-idx3-ubyte", "train-images.idx3-ubyte.gz"),
                     ("train-labels-idx1-ubyte", "train-labels-idx1-ubyte.gz")):
        (idx_folder / new).write_bytes(gzip.compress((idx_folder / old).read_bytes()))
        (idx_folder / old).unlink()
    assert load_idx(idx_folder).digest == plain.digest


def test_idx_images_are_repeated_over_rgb_and_resized_when_asked(idx_folder):
    assert np.array_equal(load_idx(idx_folder, in_channels=3).images, np.stack([IMAGES] * 3, 1))
    with pytest.raises(ConfigError, match="8x8 pixels, but model.input_size=16") as caught:
        load_idx(idx_folder, input_size=16)
    assert "train-images-idx3-ubyte, image 0" in one_line(caught.value)
    larger = load_idx(idx_folder, input_size=16, resize=True).images
    assert np.array_equal(larger[5, 0], np.asarray(centre_crop(Image.fromarray(IMAGES[5]), 16)))


IDX_DAMAGE = {  # what the file holds, what the line must name
    "cut": (idx_bytes(IMAGES)[:-1], ("6x8x8", "383")),
    "longer": (idx_bytes(IMAGES) + b"\0", ("6x8x8", "more")),
    "another magic": (b"\0\0\x0d\x03" + idx_bytes(IMAGES)[4:], ("0x00000d03", "0x00000803")),
    "labels for images": (idx_bytes(LABELS), ("0x00000801", "0x00000803")),
    "cut header": (idx_bytes(IMAGES)[:9], ("header",)),
    "nothing": (b"", ("0x00000803",)),
    "no images": (idx_bytes(IMAGES[:0]), ("0x8x8",)),
    "endless": (b"\0\0\x08\x03" + b"\xff" * 12, ("4294967295",)),
    "fewer images": (idx_bytes(IMAGES[:5]), ("6 labels", "5 images", "train-labels-idx1-ubyte")),
}


@pytest.mark.parametrize(("content", "named"), IDX_DAMAGE.values(), ids=IDX_DAMAGE)
def test_a_damaged_idx_file_is_one_line_that_names_it(idx_folder, content, named):
    (idx_folder / "train-images-idx3-ubyte").write_bytes(content)
    message = failure(idx_folder, name="idx", in_channels=1)
    assert all(part in message for part in (str(idx_folder / "train-images-idx3-ubyte"), *named)), message


def test_missing_idx_files_and_folders_are_one_line(idx_folder):
    for number, path in enumerate((None, idx_folder / "missing", idx_folder / "train-images-idx3-ubyte")):
        assert f"data.path={path}" in failure(path, name="idx", in_channels=1), number
    (idx_folder / "train-labels-idx1-ubyte").unlink()
    message = failure(idx_folder, name="idx", in_channels=1)
    assert "train-labels-idx1-ubyte" in message and str(idx_folder) in message


GOOD = idx_bytes(IMAGES)
damaged = st.tuples(st.integers(0, len(GOOD)), st.integers(0, len(GOOD)), st.binary(max_size=24)).map(
    lambda cut: GOOD[: cut[0]] + cut[2] + GOOD[cut[1] :])


@settings(max_examples=150, deadline=None)
@given(content=st.one_of(st.binary(max_size=40), damaged), zipped=st.booleans(),
       flip=st.none() | st.tuples(st.integers(0), st.integers(1, 255)))
def test_any_bytes_are_an_idx_file_or_one_clear_line(tmp_path_factory, content, zipped, flip):
    path = tmp_path_factory.getbasetemp() / ("fuzz.gz" if zipped else "fuzz")
    stored = bytearray(gzip.compress(content) if zipped else content)
    if flip is not None and stored:
        stored[flip[0] % len(stored)] ^= flip[1]
    path.write_bytes(stored)
    try:
        array = read_idx(path, 3)
    except ConfigError as error:
        assert str(path) in one_line(error)
    else:
        assert array.dtype == np.uint8 and array.ndim == 3 and array.size > 0
        if not zipped:
            assert idx_bytes(array) == bytes(stored)


# ---------------------------------------------------------------- CIFAR-10 and digits

class FakeCifar10:
    """Stands in for torchvision's data set: 20 images."""

    def __init__(self, root, train, download):
        assert train and download
        self.data, self.targets = pixels(20, 32, 32, 3), [*range(10), *range(10)]


def cifar_config(tmp_path, *overrides):
    return load_config([CONFIGS / "cifar10.yaml"], [f"data.cache={tmp_path / 'cache'}", *overrides])


def test_cifar10_comes_from_torchvision_when_no_folder_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar10)
    config = cifar_config(tmp_path)
    data = load_data(config.data, config.model)
    assert np.array_equal(data.images, pixels(20, 32, 32, 3).transpose(0, 3, 1, 2))
    assert data.labels.tolist() == [*range(10), *range(10)] and data.name == "cifar10"
    grey = cifar_config(tmp_path, "model.in_channels=1")
    assert load_data(grey.data, grey.model).images.shape == (20, 1, 32, 32)


@pytest.mark.parametrize("error", [
    urllib.error.URLError("no route\nto host"), RuntimeError("File not found or corrupted."), TimeoutError("timed out"),
    PermissionError(13, "Permission denied")])
def test_a_failed_download_is_one_line_that_names_the_remedy(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    config = cifar_config(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_data(config.data, config.model)
    message = one_line(caught.value)
    assert "data.path=FOLDER" in message and str(tmp_path / "cache") in message


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("a file")
    config = cifar_config(tmp_path)
    with pytest.raises(ConfigError, match="data.path=FOLDER"):
        load_data(config.data, config.model)


def test_cifar10_from_a_folder_keeps_its_name_and_torchvisions_folder_is_pointed_to_the_cache(tmp_path):
    for label in range(10):
        save(tmp_path / "images" / f"class{label}" / "0.png", pixels(32, 32, 3, seed=label))
    config = cifar_config(tmp_path, f"data.path={tmp_path / 'images'}")
    data = load_data(config.data, config.model)
    assert data.name == "cifar10" and data.labels.tolist() == list(range(10))
    (tmp_path / "cifar-10-batches-py").mkdir()
    config = cifar_config(tmp_path, f"data.path={tmp_path}")
    with pytest.raises(ConfigError, match=f"data.cache={tmp_path}"):
        load_data(config.data, config.model)


def test_cifar10_averages_weights_with_a_decay_of_0_999_a_step_at_its_end():
    config = load_config([CONFIGS / "cifar10.yaml"])
    assert config.training.ema_decay(8000) == pytest.approx(0.999, abs=1e-5)
    assert config.training.num_steps == 8000


def test_digits_refuse_options_that_they_do_not_use(tmp_path):
    assert "data.path" in failure(tmp_path, name="digits", num_classes=10, in_channels=1)
    assert "data.resize" in failure(None, name="digits", num_classes=10, in_channels=1, resize=True)
    assert load(None, name="digits", num_classes=10, in_channels=1).images.shape == (1797, 1, 8, 8)
