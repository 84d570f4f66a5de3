"""A small run of everything that the paper's scale needs; see __main__.py."""
