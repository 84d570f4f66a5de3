"""Make `cifar64.safetensors`: python -m diffmoe.evaluation.train_cifar64 --data FOLDER (minutes on a GPU).

Trains the CIFAR-10 classifier on 90 % of the 50,000 training images, shifted and mirrored at random, and measures it on
the other 10 %, which it never sees, with the weights as the file holds them, in half precision. The file's metadata
holds the accuracy, the epochs, the split's seed and the digests of the data and of the tensors. Two GPU runs need not
write the same file, bit for bit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange

from diffmoe.cli import choose_device, run_command
from diffmoe.config import DataConfig, ModelConfig, require
from diffmoe.data import ImageData, load_data
from diffmoe.data.images import draw_flips, seeded_generator
from diffmoe.evaluation.classifiers import CIFAR, CifarClassifier, classifier_file, split, write_classifier

NUM_EPOCHS = 100
BATCH_SIZE = 512
LEARNING_RATE = 0.4
WEIGHT_DECAY = 5e-4
FEATURE_PENALTY = 0.1  # as in train_digits64.py
MAX_SHIFT = 4  # pixels each way
REQUIRED_ACCURACY = 0.88


def cifar10(folder: Path | None) -> ImageData:
    """Return CIFAR-10's training images, 3x32x32, from an image folder; None: the download.

    Raises:
        ConfigError: as `load_data` does.
    """
    model = ModelConfig(hidden_size=4, depth=1, num_heads=1, input_size=32, patch_size=32, in_channels=3,
                        num_classes=10)
    return load_data(DataConfig(name="cifar10", path=folder and str(folder)), model)


def augment(images: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    """Return images[index], (b, C, H, W), shifted by up to 4 pixels each way and mirrored with probability 1/2.

    Args:
        images: uint8 (N, H, W, C); what a shift uncovers is the reflected border.
    """
    side = images.shape[1]
    shift = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2, len(index), 1), generator=generator, device=images.device)
    moved = torch.arange(side, device=images.device) + shift
    rows, columns = (side - 1) - ((side - 1) - moved.abs()).abs()  # (b, H) and (b, W): reflected at both ends
    columns = torch.where(draw_flips(len(index), generator)[:, None], columns.flip(1), columns)
    return images[index[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # channels last


def train(data: ImageData, num_epochs: int, device: torch.device) -> tuple[CifarClassifier, float]:
    """Train from a fixed seed; return the classifier in half precision's values and its held-out accuracy."""
    images = data.images.permute(0, 2, 3, 1).contiguous().to(device)
    labels = data.labels.to(device)
    seen, held_out = (part.to(device) for part in split(CIFAR, len(images), parts=10))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CifarClassifier().to(device, memory_format=torch.channels_last)
    generator = seeded_generator("cifar64 training", 0, device=device)
    batch_size = min(BATCH_SIZE, len(seen))
    steps = len(seen) // batch_size
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, 0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_epochs * steps,
                                                   pct_start=0.2, cycle_momentum=False)
    for _ in trange(num_epochs, unit="epoch"):
        order = seen[torch.randperm(len(seen), generator=generator, device=device)]
        for batch in order[: steps * batch_size].split(batch_size):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                features, logits = model(augment(images, batch, generator))
            loss = F.cross_entropy(logits.float(), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            (loss + FEATURE_PENALTY * features.float().square().mean()).backward()
            optimizer.step()
            schedule.step()
    model.eval().half().float()  # what the file holds
    with torch.no_grad():
        right = [model(images[part].permute(0, 3, 1, 2))[1].argmax(1) == labels[part] for part in held_out.split(1000)]
    return model, torch.cat(right).double().mean().item()


def main(arguments: list[str]) -> int:
    """Train, print the held-out accuracy, and write the file if it is good enough."""
    parser = argparse.ArgumentParser(prog="python -m diffmoe.evaluation.train_cifar64", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER",
                        help="CIFAR-10's training images, one folder a class (default: the download)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=classifier_file(CIFAR), metavar="FILE",
                        help="file to write (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=NUM_EPOCHS, help="(default: %(default)s)")
    parser.add_argument("--required-accuracy", type=float, default=REQUIRED_ACCURACY, metavar="SHARE",
                        help="write nothing below it (default: %(default)s)")
    options = parser.parse_args(arguments)
    require(options.epochs >= 1, "--epochs", options.epochs, "use 1 or more")
    require(options.out.parent.is_dir(), "--out", options.out, "its folder is not there; make it first")
    device = choose_device(options.device)
    torch.set_num_threads(1)  # as train_digits64.py
    torch.backends.cudnn.benchmark = True
    data = cifar10(options.data)
    model, accuracy = train(data, options.epochs, device)
    write_classifier(model, options.out, accuracy=accuracy, required=options.required_accuracy,
                     data_digest=data.digest, dtype=torch.float16, epochs=options.epochs)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
