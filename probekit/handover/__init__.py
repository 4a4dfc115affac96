"""A choice handed over: what an engine needs, in a folder."""
