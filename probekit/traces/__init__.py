"""A trace, in memory and on disk. Nothing here needs torch."""
