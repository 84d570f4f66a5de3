"""Sweeps over the axes of the method; they build on diffmoe and baselines, and neither knows of them."""
