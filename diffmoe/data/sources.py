"""Where training images come from, by `data.name`."""

from __future__ import annotations

import torch

from diffmoe.config import ConfigError, DataConfig, ModelConfig
from diffmoe.data.images import ImageData


def load_data(config: DataConfig, model: ModelConfig) -> ImageData:
    """Load the images that `config` names and check that `model` fits them.

    Raises:
        ConfigError: for an unknown name, or a model of another image size, channels or classes.
    """
    if config.name not in SOURCES:
        raise ConfigError(f"data.name={config.name}: use one of {', '.join(SOURCES)}")
    data = SOURCES[config.name]()
    _, channels, height, width = data.images.shape
    want = (model.in_channels, model.input_size, model.input_size, model.num_classes)
    if (channels, height, width, data.num_classes) != want:
        raise ConfigError(f"data.name={config.name}: {channels}x{height}x{width} images of {data.num_classes} classes; "
                          f"the model takes {want[0]}x{want[1]}x{want[2]} and {want[3]}: set model.in_channels, "
                          "model.input_size and model.num_classes")
    return data


def load_digits() -> ImageData:
    """Return scikit-learn's 1797 handwritten digits, 1x8x8, which come with the package."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    images = torch.from_numpy(digits.images)[:, None] * (255 / 16)  # 17 grey levels, 0 to 16
    return ImageData("digits", images.round().to(torch.uint8), torch.from_numpy(digits.target).long(), 10)


SOURCES = {"digits": load_digits}
