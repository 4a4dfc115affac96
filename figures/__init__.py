"""A paper's figures, a script each: `probekit figures STUDY` draws the same, `python -m figures` these."""
