"""The baselines: routers and their YAML rows, no backbone code."""
