"""Training images, held as uint8 and served in an order that depends on the seed alone."""

from diffmoe.data.images import ImageData, ImageOrder
from diffmoe.data.sources import load_data

__all__ = ["ImageData", "ImageOrder", "load_data"]
