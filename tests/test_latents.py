"""Latents: encoded from generated images by a small random autoencoder, resumed, checked, drawn from, decoded."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import one_line, random_model, run_config
from PIL import Image

from diffmoe.cli import run_command
from diffmoe.config import ConfigError, DataConfig
from diffmoe.data import latents, load_data
from diffmoe.data.conversion import centre_crop
from diffmoe.data.images import seeded_generator, to_model_range
from diffmoe.data.latent_data import MANIFEST, LatentData, check_latents, load_latents
from diffmoe.evaluation.diagnosis import diagnose
from diffmoe.evaluation.sampling import sample_images
from diffmoe.models.vae import load_vae
from diffmoe.training.trainer import Trainer

diffusers = pytest.importorskip("diffusers")
CPU = torch.device("cpu")
SIZES = [(16, 16), (40, 20), (17, 33), (16, 24), (70, 70)]


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16], latent_channels=4, norm_num_groups=4, sample_size=16, scaling_factor=0.5,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def tree(tmp_path):
    """Two classes of five images each, of several sizes."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for index, (width, height) in enumerate(SIZES):
            Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "images"


def encode(tree, vae_folder, out, *more):
    return latents.main(["--images", str(tree), "--vae", str(vae_folder), "--out", str(out), "--size", "16",
                         "--shard-images", "4", "--batch-size", "3", "--device", "cpu", *more])


@pytest.fixture
def encoded(tree, vae_folder, tmp_path):
    encode(tree, vae_folder, tmp_path / "latents")
    return tmp_path / "latents"


def test_stored_moments_are_those_of_the_cropped_images_and_their_mirror_images(tree, encoded, vae_folder):
    data = LatentData(encoded)
    vae = diffusers.AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False)
    files = sorted(tree.glob("*/*.png"))
    assert len(data) == 10 and data.labels.tolist() == [0] * 5 + [1] * 5 and data.shape == (4, 8, 8)
    assert data.manifest.classes == ["cat", "dog"] and data.manifest.vae["scale"] == 0.5
    assert [shard["images"] for shard in data.manifest.shards] == [4, 4, 2]
    stored = data._read(torch.arange(10))
    for index in (0, 3, 4, 9):
        pixels = np.asarray(centre_crop(Image.open(files[index]), 16)).transpose(2, 0, 1).copy()
        for side, image in enumerate((torch.from_numpy(pixels), torch.from_numpy(pixels).flip(-1))):
            with torch.no_grad():
                posterior = vae.encode(to_model_range(image)[None]).latent_dist
            torch.testing.assert_close(stored[index, side, 0], posterior.mean[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(stored[index, side, 1], posterior.logvar[0], rtol=1e-4, atol=1e-5)


def test_interrupted_work_goes_on_and_a_broken_shard_is_made_again(tree, encoded, vae_folder):
    whole = {path.name: path.read_bytes() for path in encoded.iterdir()}
    (encoded / MANIFEST).unlink()
    (encoded / "shard-00001.json").unlink()                             # killed between shard and description
    (encoded / "shard-00002.npy").write_bytes(whole["shard-00002.npy"][:-8])
    (encoded / "shard-00001.npy.4194305.partial").write_bytes(b"half")  # more than a process id can be
    before = (encoded / "shard-00000.npy").stat().st_mtime_ns
    encode(tree, vae_folder, encoded)
    assert (encoded / "shard-00000.npy").stat().st_mtime_ns == before   # finished: not touched
    assert {path.name: path.read_bytes() for path in encoded.iterdir()} == whole


def test_parts_make_the_same_latents_as_one_process_and_the_last_one_the_manifest(tree, encoded, vae_folder, tmp_path):
    parts = tmp_path / "parts"
    encode(tree, vae_folder, parts, "--shard", "1/2")
    assert not (parts / MANIFEST).exists()
    with pytest.raises(ConfigError) as caught:
        load_latents(DataConfig(name="latents", path=str(parts)))
    assert "diffmoe.data.latents" in one_line(caught.value)
    encode(tree, vae_folder, parts, "--shard", "0/2")
    assert {path.name: path.read_bytes() for path in parts.iterdir()} == {
        path.name: path.read_bytes() for path in encoded.iterdir()}


def test_a_broken_image_is_named_and_is_fatal_or_left_out_by_choice(tree, vae_folder, tmp_path, capsys):
    (tree / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(ConfigError) as caught:
        encode(tree, vae_folder, tmp_path / "out")
    assert "cat/1.png" in one_line(caught.value) and "--broken skip" in str(caught.value)
    encode(tree, vae_folder, tmp_path / "out", "--broken", "skip")
    data = LatentData(tmp_path / "out")
    assert len(data) == 9 and data.manifest.skipped == ["cat/1.png"] and data.labels.tolist() == [0] * 4 + [1] * 5
    assert "cat/1.png" in "".join(capsys.readouterr())


def test_checksums_notice_one_flipped_bit_and_sizes_a_lost_end(encoded):
    assert check_latents(encoded).digest == LatentData(encoded).digest
    path = encoded / "shard-00001.npy"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        latents.main(["--check", str(encoded)])
    assert "shard-00001.npy" in one_line(caught.value)
    path.write_bytes(content[:-100])
    with pytest.raises(ConfigError) as caught:
        LatentData(encoded)
    assert "shard-00001.npy" in one_line(caught.value)


def test_the_data_digest_names_the_content_not_the_place(encoded, tree, vae_folder, tmp_path):
    digest = LatentData(encoded).digest
    assert LatentData(encoded.rename(tmp_path / "moved")).digest == digest
    encode(tree, vae_folder, tmp_path / "plain", "--no-flips")
    assert LatentData(tmp_path / "plain").digest != digest


def test_a_draw_is_mean_plus_spread_times_new_noise_scaled(encoded):
    data = LatentData(encoded)
    index = torch.tensor([7, 0, 7, 4, 9, 1, 2, 8])
    generator = seeded_generator("draw")
    drawn = data.draw(index, slice(None), flip=True, generator=generator)
    generator = seeded_generator("draw")
    noise = torch.randn(8, 4, 8, 8, generator=generator)
    flipped = torch.rand(8, generator=generator) < 0.5
    assert flipped.any() and not flipped.all()
    stored = data._read(index)
    for row in range(8):
        mean, logvar = stored[row, int(flipped[row])]
        torch.testing.assert_close(drawn[row], 0.5 * (mean + (logvar / 2).exp() * noise[row]))
    assert not torch.equal(drawn[0], drawn[2])  # the same image, another eps
    part = data.draw(index, slice(1, 3), flip=True, generator=seeded_generator("draw"))
    assert torch.equal(part, drawn[1:3])        # a process's share is that of the whole batch


def latent_run(folder, **changes):
    return run_config({"data.name": "latents", "data.path": str(folder), "model.in_channels": 4, "model.num_classes": 2,
                       "data.horizontal_flip": True, **changes})


def test_training_draws_the_same_batches_with_and_without_reading_ahead(encoded):
    config = latent_run(encoded)
    data = load_data(config.data, config.model)
    one, other = Trainer(config, 0, data, CPU), Trainer(config, 0, pickle.loads(pickle.dumps(data)), CPU)
    ahead = [one.batch(step) for step in range(4)]  # in order: each was read while the one before was used
    assert one.data.ahead is not None
    for step in (3, 1):
        alone = other.batch(step)
        assert torch.equal(ahead[step].images, alone.images) and torch.equal(ahead[step].labels, alone.labels)
    assert all(torch.isfinite(loss) for loss in one.train_step().values())


def test_a_network_of_latents_is_diagnosed_by_their_classes(encoded):
    model = random_model(in_channels=4, num_classes=2).eval()
    found = diagnose(model, latent_run(encoded), 0, LatentData(encoded))
    assert all(None not in loads and len(loads) == 2 for layer in found["load_by_class"] for loads in layer)


def test_the_decoder_inverts_the_scaling_and_gives_pixels(vae_folder):
    vae = load_vae(str(vae_folder), CPU)
    z = torch.randn(3, 4, 8, 8, generator=seeded_generator("z"))
    with torch.no_grad():
        expected = ((vae.model.decode(z / 0.5).sample + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(vae.decode(z), expected) and vae.factor == 2


@pytest.mark.parametrize(("arguments", "named"), [
    (["--vae", "V", "--out", "O"], "--images"), (["--images", "I", "--out", "O"], "--vae"),
    (["--images", "I", "--vae", "V", "--out", "O", "--shard-images", "0"], "--shard-images"),
    (["--images", "TREE", "--vae", "VAE", "--out", "O", "--size", "15", "--device", "cpu"], "--size"),
    (["--images", "TREE", "--vae", "no/where/at-all", "--out", "O", "--device", "cpu"], "no/where/at-all"),
    (["--images", "TREE", "--vae", "VAE", "--out", "O", "--shard", "2/2"], "--shard"),
    (["--images", "I", "--vae", "VAE", "--out", "O"], "no folder I"),
    (["--check", "O"], "manifest.json"),
])
def test_what_cannot_be_used_is_one_line(arguments, named, tree, vae_folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = {"TREE": str(tree), "VAE": str(vae_folder)}
    monkeypatch.setattr("sys.argv", ["latents", *(places.get(word, word) for word in arguments)])
    assert run_command(latents.main) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


def test_latents_of_another_kind_are_not_overwritten_and_not_used_mirrored(tree, encoded, vae_folder, tmp_path):
    with pytest.raises(ConfigError) as caught:
        encode(tree, vae_folder, encoded, "--no-flips")
    assert "--out" in one_line(caught.value)
    encode(tree, vae_folder, tmp_path / "plain", "--no-flips")
    with pytest.raises(ConfigError) as caught:
        load_latents(DataConfig(name="latents", path=str(tmp_path / "plain"), horizontal_flip=True))
    assert "data.horizontal_flip" in one_line(caught.value)


def test_a_manifest_of_another_format_is_one_line(encoded):
    (encoded / MANIFEST).write_text(json.dumps({"format": 9}))
    with pytest.raises(ConfigError) as caught:
        LatentData(encoded)
    assert "format 9" in one_line(caught.value)


def test_samples_of_latents_are_decoded_images_and_a_wrong_autoencoder_is_refused(encoded, vae_folder, tmp_path):
    config = latent_run(encoded, **{"sampling.num_steps": 2, "sampling.batch_size": 2})
    model = random_model(in_channels=4, num_classes=2).eval()
    samples = sample_images(model, config, range(3))
    assert samples.images.shape == (3, 3, 16, 16) and samples.images.dtype == torch.uint8
    away = replace(config, data=replace(config.data, path=None, vae=str(vae_folder)))
    assert torch.equal(sample_images(model, away, range(3)).images, samples.images)  # without the latents
    other = tmp_path / "other"
    shutil.copytree(vae_folder, other)
    load_vae.cache_clear()
    network = diffusers.AutoencoderKL.from_pretrained(other, low_cpu_mem_usage=False)
    network.decoder.conv_out.bias.data += 1
    network.save_pretrained(other)
    for data in (replace(config.data, vae=str(other)), replace(away.data, vae=None)):
        with pytest.raises(ConfigError) as caught:
            sample_images(model, replace(config, data=data), range(3))
        assert "data.vae" in one_line(caught.value)
