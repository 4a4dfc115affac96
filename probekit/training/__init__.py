"""Training recipes, written with hooks."""
