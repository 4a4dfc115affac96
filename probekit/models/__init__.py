"""Models: where their parts are, how they are loaded, the ones that ship, and synthetic ones."""
