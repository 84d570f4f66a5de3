"""The shipped classifiers: what they recognise, what they refuse, and the script that makes CIFAR-10's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from diffmoe.config import ConfigError
from diffmoe.data.images import seeded_generator
from diffmoe.evaluation import classifiers, train_cifar64
from diffmoe.evaluation.classifiers import (
    CIFAR,
    CLASSIFIERS,
    DIGITS,
    classifier_file,
    classify,
    load_classifier,
    read_classifier,
    split,
    tensors_digest,
)
from diffmoe.evaluation.extractors import ClassifierFeatures, weights_file
from diffmoe.evaluation.train_digits64 import digits

DIGITS_DIGEST = "e47fe50a2990"


def random_images(*shape: int) -> Tensor:
    return torch.randint(256, shape, generator=seeded_generator("classifiers")).to(torch.uint8)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a file's tensors as they lie there, and what is said of them."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["made"])  # noqa: SIM118


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    """Ten classes of three grey levels and noise: 30 images of 32x32."""
    root = tmp_path_factory.mktemp("images")
    for label in range(10):
        (root / f"class{label}").mkdir()
        for number, image in enumerate(random_images(3, 32, 32, 3) // 8 + 22 * label):
            Image.fromarray(image.numpy()).save(root / f"class{label}" / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory) -> Path:
    """What two epochs on these images write."""
    out = tmp_path_factory.mktemp("weights") / "cifar64.safetensors"
    assert train_cifar64.main(["--data", str(image_folder), "--device", "cpu", "--epochs", "2", "--out", str(out),
                               "--required-accuracy", "0"]) == 0
    return out


def test_digits64_recognises_the_digits_that_it_never_saw():
    data = digits()
    seen, held_out = split(DIGITS, len(data.images), parts=5)
    assert sorted(torch.cat([seen, held_out]).tolist()) == list(range(1797)) and len(held_out) == 360
    accuracy = (classify(data.images[held_out]) == data.labels[held_out]).double().mean().item()
    assert accuracy >= 0.97
    assert torch.equal(classify(data.images[:50].repeat(1, 3, 1, 1)), classify(data.images[:50]))
    model, image = load_classifier(DIGITS), data.images[:1].float()
    coloured = image * torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1)  # its mean over channels is the grey image
    torch.testing.assert_close(model(coloured), model(image))
    tensors, made = read_file(classifier_file(DIGITS))
    assert made == {"accuracy": round(accuracy, 4), "split_seed": 0, "data_digest": data.digest,
                    "digest": tensors_digest(tensors)}
    assert made["digest"] == DIGITS_DIGEST
    assert classifier_file(DIGITS).stat().st_size < 200_000


@pytest.mark.skipif(not classifier_file(CIFAR).exists(), reason="cifar64 is not trained yet")
def test_cifar64_is_the_file_that_its_metadata_describes():
    tensors, made = read_file(classifier_file(CIFAR))
    assert made["digest"] == tensors_digest(tensors)
    assert made["accuracy"] >= train_cifar64.REQUIRED_ACCURACY and made["epochs"] == train_cifar64.NUM_EPOCHS
    assert classifier_file(CIFAR).stat().st_size < 700_000
    features, logits = ClassifierFeatures(CIFAR, ["features", "logits"])(random_images(2, 3, 32, 32))
    assert features.shape == (2, 64) and logits.isfinite().all()


@pytest.mark.parametrize(("name", "wrong", "takes"), [
    (DIGITS, (3, 10, 10), "it takes 8x8 images of 1 or 3 channels"), (DIGITS, (2, 8, 8), "it takes 8x8"),
    (CIFAR, (3, 64, 64), "it takes 32x32 images of 3 channels"), (CIFAR, (3, 32, 16), "it takes 32x32")])
def test_images_of_another_shape_are_refused_with_the_remedy(name, wrong, takes):
    with pytest.raises(ConfigError, match=rf"^extractor={name}: .*{takes}.*use an efficientnet-lite0") as caught:
        CLASSIFIERS[name]()(random_images(2, *wrong))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line_that_names_the_script(tmp_path, monkeypatch):
    monkeypatch.setattr(classifiers, "classifier_file", lambda name: tmp_path / f"{name}.safetensors")
    load_classifier.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"^extractor=cifar64: .*python -m diffmoe\.evaluation\.train_cifar64"):
            weights_file(CIFAR)
    finally:
        load_classifier.cache_clear()


def test_the_script_writes_a_file_that_reads_back_as_it_was_measured(trained, image_folder):
    data = train_cifar64.cifar10(image_folder)
    model = read_classifier(CIFAR, trained)
    tensors, made = read_file(trained)
    _, held_out = split(CIFAR, len(data), parts=10)
    accuracy = (model(data.images[held_out])[1].argmax(1) == data.labels[held_out]).double().mean().item()
    assert made == {"accuracy": round(accuracy, 4), "split_seed": 0, "data_digest": data.digest,
                    "digest": tensors_digest(tensors), "epochs": 2}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16, torch.int64}
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert trained.stat().st_size < 700_000
    features, logits = model(data.images[:5])
    assert features.shape == (5, 64) and logits.shape == (5, 10) and features.min() >= 0


def test_a_classifier_below_the_required_accuracy_leaves_the_file_alone(image_folder, tmp_path):
    out = tmp_path / "cifar64.safetensors"
    out.write_bytes(b"the former")
    with pytest.raises(SystemExit, match="left as it was: 1.1 is required"):
        train_cifar64.main(["--data", str(image_folder), "--device", "cpu", "--epochs", "1", "--out", str(out),
                            "--required-accuracy", "1.1"])
    assert out.read_bytes() == b"the former"
    for mistake in (["--epochs", "0"], ["--out", str(tmp_path / "none" / "file")], ["--data", str(tmp_path / "none")]):
        with pytest.raises(ConfigError):
            train_cifar64.main(["--device", "cpu", *mistake])


def test_augmented_images_are_crops_of_the_reflected_image_or_of_its_mirror_image():
    image = random_images(1, 3, 32, 32)
    index = torch.zeros(400, dtype=torch.int64)
    got = train_cifar64.augment(image.permute(0, 2, 3, 1), index, seeded_generator("augment"))
    padded = torch.nn.functional.pad(image.float(), (4, 4, 4, 4), mode="reflect")[0].to(torch.uint8)
    views = [padded[:, top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
    crops, mirrored = ({one.numpy().tobytes() for one in all_views}
                       for all_views in (views, [view.flip(2) for view in views]))
    made = [one.numpy().tobytes() for one in got]
    assert all(one in crops or one in mirrored for one in made)
    assert 160 < sum(one in mirrored for one in made) < 240
    assert len(set(made)) > 120  # of 162
