"""A paper's figures and tables from a study folder: `probekit figures STUDY`. Never imports torch."""
