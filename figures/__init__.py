"""A paper's figures from a study folder: `python -m figures --study DIR`."""
