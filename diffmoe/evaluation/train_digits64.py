"""Make `digits64.safetensors`: python -m diffmoe.evaluation.train_digits64 (a minute on one CPU core).

Trains the digit classifier on 80 % of scikit-learn's digits, shifted, turned and made noisy a little, and measures
it on the other 20 %, which it never sees. The file's metadata holds the accuracy, the split's seed and the digests
of the data and of the tensors. The same machine and torch write the same file, bit for bit.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from diffmoe.config import DataConfig, ModelConfig
from diffmoe.data import ImageData, load_data
from diffmoe.data.images import seeded_generator
from diffmoe.evaluation.classifiers import DIGITS, DigitClassifier, classifier_file, split, write_classifier

NUM_STEPS = 3000
BATCH_SIZE = 128
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
FEATURE_PENALTY = 0.1  # features of about unit size: KID's cubic kernel is heavy-tailed on large ones
REQUIRED_ACCURACY = 0.97


def digits() -> ImageData:
    """Return scikit-learn's digits as every run sees them, 1x8x8."""
    model = ModelConfig(hidden_size=4, depth=1, num_heads=1, input_size=8, patch_size=8, in_channels=1, num_classes=10)
    return load_data(DataConfig(name="digits"), model)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn images (N, 1, 8, 8) by up to 10 degrees, shift them by up to 3/4 pixel each way, add noise of sd 8."""
    angle, across, down = (torch.rand(3, len(images), generator=generator) * 2 - 1) * torch.tensor(
        [[math.pi / 18], [0.75 / 4], [0.75 / 4]])  # a shift of 1 is half an image, 4 pixels
    turn = torch.stack([angle.cos(), -angle.sin(), across, angle.sin(), angle.cos(), down], 1).view(-1, 2, 3)
    moved = F.grid_sample(images, F.affine_grid(turn, images.shape, align_corners=False), align_corners=False)
    return (moved + 8 * torch.randn(moved.shape, generator=generator)).clamp(0, 255)


def train() -> tuple[DigitClassifier, float]:
    """Train from a fixed seed; return the classifier and its accuracy on the held-out images."""
    data = digits()
    images, labels = data.images.float(), data.labels
    seen, held_out = split(DIGITS, len(images), parts=5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DigitClassifier()
    generator = seeded_generator("digits64 training", 0)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=NUM_STEPS)
    for _ in range(NUM_STEPS):
        batch = seen[torch.randint(len(seen), (BATCH_SIZE,), generator=generator)]
        features, logits = model(augment(images[batch], generator))
        loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.05)
        optimizer.zero_grad()
        (loss + FEATURE_PENALTY * features.square().mean()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return model, (model(images[held_out])[1].argmax(1) == labels[held_out]).double().mean().item()


def main() -> None:
    """Train, print the held-out accuracy, and write the file if it is good enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=classifier_file(DIGITS),
                        help="file to write (default: %(default)s)")
    out = parser.parse_args().out
    torch.set_num_threads(1)  # one result at any number of cores
    model, accuracy = train()
    write_classifier(model, out, accuracy=accuracy, required=REQUIRED_ACCURACY, data_digest=digits().digest)


if __name__ == "__main__":
    main()
