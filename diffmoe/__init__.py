"""DiffMoE: mixture-of-experts diffusion transformers, compared on one backbone and one trainer."""

from diffmoe.config import ModelConfig
from diffmoe.models.dit import build_model

__all__ = ["ModelConfig", "build_model"]
