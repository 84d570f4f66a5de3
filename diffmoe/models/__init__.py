"""The DiT backbone."""
