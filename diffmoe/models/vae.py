"""The autoencoder between images and latents: diffusers' AutoencoderKL, in float32.

    images (B, 3, H, W)  --encode_moments-->  mean and log-variance (B, 2, C, h, w)
    latents (B, C, h, w) --decode-->          images

The model sees latents (z - shift) * scale, so that they have a standard deviation of about one; both numbers belong to
the autoencoder (0.18215 and 0 for Stable Diffusion's).
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import torch
from torch import Tensor

from diffmoe.config import ConfigError, require
from diffmoe.data.images import to_model_range, to_pixels

DECODED_AT_ONCE = 32
"""Images of one call of the decoder, whose activations are far larger than its output."""


def autoencoder_class() -> type:
    """Return diffusers' AutoencoderKL, an optional extra of this package.

    Raises:
        ConfigError: when diffusers is missing.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ConfigError(f"latents need diffusers ({error}); pip install 'diffmoe[latents]'") from None
    return AutoencoderKL


class Vae:
    """An autoencoder on a device, in eval mode.

    Args:
        name: a folder as `save_pretrained` writes it, or a name on the Hugging Face hub.
        device: where it computes.

    Raises:
        ConfigError: when diffusers is missing, or there is no autoencoder of that name in safetensors.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        autoencoder_kl = autoencoder_class()
        try:  # safetensors only: reading weights must not execute anything
            self.model = autoencoder_kl.from_pretrained(name, use_safetensors=True, low_cpu_mem_usage=False)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(f"vae={name}: no AutoencoderKL in safetensors there ({str(error)[:200]}); give a folder "
                              "that save_pretrained wrote, or a name on the hub while there is a network") from None
        self.model.to(device).eval().requires_grad_(False)
        self.name = name
        self.device = device
        settings = self.model.config
        self.scale = float(settings.scaling_factor)
        self.shift = float(settings.shift_factor or 0.0)
        self.channels = int(settings.latent_channels)
        self.factor = 2 ** (len(settings.block_out_channels) - 1)
        """Pixels a side of one latent."""
        require(settings.in_channels == settings.out_channels == 3, "vae", name, "its images need 3 channels")

    @functools.cached_property
    def digest(self) -> str:
        """Return 12 hex digits that name the weights and what a latent is scaled by."""
        content = hashlib.sha256(repr((self.scale, self.shift)).encode())
        for key, value in sorted(self.model.state_dict().items()):
            content.update(repr((key, tuple(value.shape))).encode())
            content.update(value.cpu().contiguous().numpy().tobytes())
        return content.hexdigest()[:12]

    def describe(self) -> dict[str, Any]:
        """Return what a data set of latents keeps of it: `name`, `digest`, `scale`, `shift`."""
        return {"name": self.name, "digest": self.digest, "scale": self.scale, "shift": self.shift}

    @torch.no_grad()
    def encode_moments(self, images: Tensor) -> Tensor:
        """Return mean and log-variance, float32 (B, 2, C, h, w), of uint8 images (B, 3, H, W)."""
        posterior = self.model.encode(to_model_range(images.to(self.device))).latent_dist
        return torch.stack([posterior.mean, posterior.logvar], 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 images (B, 3, H, W) of the model's latents (B, C, h, w)."""
        z = latents.float() / self.scale + self.shift
        return torch.cat([to_pixels(self.model.decode(part).sample) for part in z.split(DECODED_AT_ONCE)])


@functools.lru_cache(maxsize=1)
def load_vae(name: str, device: torch.device) -> Vae:
    """Return the autoencoder `name` on `device`; the last one is kept.

    Raises:
        ConfigError: as `Vae` does.
    """
    return Vae(name, device)
