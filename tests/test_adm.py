"""ADM's metrics: from a reference file, by their definitions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import one_line, rand, run_config

from diffmoe.cells import check_evaluation, measure_samples, reference_digest, sampling_floors
from diffmoe.config import ConfigError
from diffmoe.data import load_data
from diffmoe.evaluation import adm
from diffmoe.evaluation.sampling import Samples

CPU = torch.device("cpu")


def pixels(count, seed=0, side=8):
    return np.random.default_rng(seed).integers(256, size=(count, side, side, 3), dtype=np.uint8)


def fake_features(images, weights_path, device, batch_size):
    """Return features that are linear in the pixels: pooled (N, 6), logits (N, 5), spatial (N, 4)."""
    flat = images.reshape(len(images), -1).double() / 255
    return tuple(flat @ rand(flat.shape[1], width, seed=width).double() for width in (6, 5, 4))


def frechet_by_definition(a, b):
    (mu_a, cov_a), (mu_b, cov_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    return ((mu_a - mu_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real)


def share_inside(points, centres):
    """Return the share of points within the third-neighbour distance of some centre (Kynkaanniemi et al., eq. 2)."""
    between = np.linalg.norm(centres[:, None] - centres, axis=-1)
    radius = np.sort(between, 1)[:, 3]
    return (np.linalg.norm(points[:, None] - centres, axis=-1) <= radius).any(1).mean()


@pytest.fixture
def measured(tmp_path, monkeypatch):
    monkeypatch.setattr(adm, "extract", fake_features)
    np.savez(tmp_path / "reference.npz", arr_0=pixels(70, 1))
    samples = torch.from_numpy(pixels(60, 2) // 2 + 60).permute(0, 3, 1, 2)
    reference = adm.read_reference(tmp_path / "reference.npz")
    found = adm.measure_adm(samples, reference, device=CPU, kid_subset_size=20)
    features = [[part.numpy() for part in fake_features(images, None, CPU, 1)]
                for images in (samples, reference.images)]
    return found, *features


def test_fid_and_sfid_are_frechet_distances_of_pooled_and_spatial_features(measured):
    found, ours, real = measured
    assert found["distance"] == pytest.approx(frechet_by_definition(ours[0], real[0]), rel=1e-6)
    assert found["sfid"] == pytest.approx(frechet_by_definition(ours[2], real[2]), rel=1e-6)


def test_precision_and_recall_are_shares_inside_third_neighbour_balls(measured):
    found, ours, real = measured
    assert found["precision"] == pytest.approx(share_inside(ours[0], real[0]))
    assert found["recall"] == pytest.approx(share_inside(real[0], ours[0]))
    assert 0 < found["recall"] < 1


def test_the_inception_score_takes_parts_of_5000_in_their_order(measured, monkeypatch):
    def score(logits):
        p = np.exp(logits - scipy.special.logsumexp(logits, 1, keepdims=True))
        return np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    found, ours, _ = measured
    assert found["inception_score"] == pytest.approx(score(ours[1]))  # fewer than 5,000: one part
    monkeypatch.setattr(adm, "SCORE_PART", 20)
    images = torch.from_numpy(pixels(60, 2) // 2 + 60).permute(0, 3, 1, 2)
    reference = adm.Reference("", images, None, None)
    parts = [score(ours[1][start : start + 20]) for start in (0, 20, 40)]
    assert adm.measure_adm(images, reference, device=CPU, kid_subset_size=20)["inception_score"] == pytest.approx(
        np.mean(parts))


def test_statistics_in_the_file_go_before_its_images(tmp_path, monkeypatch):
    monkeypatch.setattr(adm, "extract", fake_features)
    samples = torch.from_numpy(pixels(60, 2)).permute(0, 3, 1, 2)
    pooled, _, spatial = fake_features(samples, None, CPU, 1)
    statistics = {f"{name}{mark}": value for mark, x in (("", pooled.numpy()), ("_s", spatial.numpy()))
                  for name, value in (("mu", x.mean(0)), ("sigma", np.cov(x, rowvar=False)))}
    np.savez(tmp_path / "r.npz", arr_0=pixels(70, 1), **statistics)
    found = adm.measure_adm(samples, adm.read_reference(tmp_path / "r.npz"), device=CPU, kid_subset_size=20)
    assert abs(found["distance"]) < 1e-6 and abs(found["sfid"]) < 1e-6 and found["precision"] < 1
    np.savez(tmp_path / "bad.npz", arr_0=pixels(70, 1), mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ConfigError) as caught:
        adm.measure_adm(samples, adm.read_reference(tmp_path / "bad.npz"), device=CPU, kid_subset_size=20)
    assert "statistics" in one_line(caught.value)


def test_the_network_gives_pooled_features_logits_and_seven_channels_of_mixed_6():
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url",
                      lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
        with pytest.raises(ConfigError) as caught:
            adm.extract(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None, CPU, 1)
        assert "evaluation.extractor_weights" in one_line(caught.value)
        patch.setattr(adm.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        network = adm.AdmInception(None)
    images = torch.from_numpy(pixels(2, 3)).permute(0, 3, 1, 2)
    seen = []
    network.Mixed_6d.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    pooled, logits, spatial = network(images)
    assert (pooled.shape, logits.shape, spatial.shape) == ((2, 2048), (2, 1008), (2, 7 * 17 * 17))
    ((block_input, block_output),) = seen
    assert block_input.shape == (2, 768, 17, 17)
    # the block's output starts with this branch; ReLU is part of both
    assert torch.equal(spatial.view(2, 7, 17, 17), block_output[:, :7])


def test_a_cell_is_measured_against_the_file_and_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(adm, "extract", fake_features)
    np.savez(tmp_path / "r.npz", arr_0=pixels(70, 1))
    config = run_config({"model.in_channels": 1, "evaluation.reference": str(tmp_path / "r.npz"),
                         "evaluation.num_samples": 60, "evaluation.kid_subset_size": 20})
    data = load_data(config.data, config.model)
    check_evaluation(config.evaluation, data)
    images = torch.from_numpy(pixels(60, 2)).permute(0, 3, 1, 2)
    samples = Samples(images, torch.zeros(60, dtype=torch.int64), None, None, None, None)
    assert measure_samples(samples, config, data, tmp_path, CPU).keys() >= {"distance", "sfid", "recall", "kid"}
    assert sampling_floors(config.evaluation, data, tmp_path, CPU) == {}
    assert reference_digest(config.evaluation, data) == adm.read_reference(tmp_path / "r.npz").digest != data.digest
    for evaluation, named in ((replace(config.evaluation, extractor="digits64"), "evaluation.extractor"),
                              (replace(config.evaluation, second_extractor="vgg16"), "evaluation.second_extractor"),
                              (replace(config.evaluation, memorisation=True), "evaluation.memorisation"),
                              (replace(config.evaluation, kid_subset_size=60, num_samples=90), None),
                              (replace(config.evaluation, kid_subset_size=80, num_samples=90), "kid_subset_size")):
        if named is None:
            check_evaluation(evaluation, None)
            continue
        with pytest.raises(ConfigError) as caught:
            check_evaluation(evaluation, None)
        assert named in one_line(caught.value)
    with pytest.raises(ConfigError) as caught:
        check_evaluation(replace(config.evaluation, reference=None), None)  # latents
    assert "evaluation.reference" in one_line(caught.value)


@pytest.mark.parametrize("content", [b"text", None, {"arr_0": np.zeros((3, 8, 8, 3))}, {"mu": np.zeros(3)},
                                     {"arr_0": np.array([{}], dtype=object)}])
def test_a_file_that_is_no_reference_is_one_line(content, tmp_path):
    path = tmp_path / "bad.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    with pytest.raises(ConfigError) as caught:
        adm.read_reference(path)
    assert "evaluation.reference" in one_line(caught.value) and "bad.npz" in str(caught.value)
