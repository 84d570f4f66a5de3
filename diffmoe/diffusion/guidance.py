"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): uncond + scale * (cond - uncond).

Only leading channels are guided; the rest, learned sigma among it, is the conditional prediction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffmoe.config import GuidedForward, SamplingConfig, require
from diffmoe.diffusion.process import Predict

PredictLabels = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The network: x (B, C, H, W), times (B,), labels int64 (B,) -> raw output (B, C or 2C, H, W)."""


def guided(predict_labels: PredictLabels, labels: Tensor, null_label: int | None, config: SamplingConfig) -> Predict:
    """Return the guided prediction for `labels` (B,); at scale 1 or without a null label, the conditional one.

    Raises (when called):
        ConfigError: when `guided_channels` is more than the channels of x.
    """
    scale = config.guidance_scale
    if scale == 1 or null_label is None:
        return lambda x, t: predict_labels(x, t, labels)
    null_labels = torch.full_like(labels, null_label)

    def separate(x: Tensor, t: Tensor) -> Tensor:
        cond, uncond = predict_labels(x, t, labels), predict_labels(x, t, null_labels)
        return _combine(cond, uncond, scale, _guided_channels(x, config))[0]

    def joint(x: Tensor, t: Tensor) -> Tensor:
        return guided_halves(predict_labels, x, t, labels, null_labels, scale, _guided_channels(x, config))[0]

    return joint if config.guided_forward is GuidedForward.JOINT else separate


def guided_halves(predict_labels: PredictLabels, x: Tensor, t: Tensor, labels: Tensor, null_labels: Tensor,
                  scale: float, channels: int) -> tuple[Tensor, Tensor]:
    """Run both halves as one batch of 2B, as DiT's forward_with_cfg does, and return (cond_half, uncond_half).

    The first `channels` channels are guided and the same in both halves; the others stay each half's own.

    Args:
        x, t, labels, null_labels: B rows each; x and t are the input of both halves.
        scale: guidance scale.
        channels: leading channels to guide.
    """
    output = predict_labels(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null_labels]))
    cond, uncond = output.chunk(2)
    return _combine(cond, uncond, scale, channels)


def _combine(cond: Tensor, uncond: Tensor, scale: float, channels: int) -> tuple[Tensor, Tensor]:
    leading = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([leading, cond[:, channels:]], 1), torch.cat([leading, uncond[:, channels:]], 1)


def _guided_channels(x: Tensor, config: SamplingConfig) -> int:
    channels = x.shape[1] if config.guided_channels is None else config.guided_channels
    require(channels <= x.shape[1], "sampling.guided_channels", channels,
            f"the image has {x.shape[1]} channels; null guides all of them")
    return channels
