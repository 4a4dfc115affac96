"""Handing a choice to the engine that you run: a file an engine, and what all of them share."""
