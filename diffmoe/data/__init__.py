"""Training images or latents, served in an order that depends on the seed alone."""

from diffmoe.data.images import ImageData, ImageOrder, TrainingData
from diffmoe.data.sources import load_data

__all__ = ["ImageData", "ImageOrder", "TrainingData", "load_data"]
