"""Sampling a fixed set of seeds, and what is measured of it."""
