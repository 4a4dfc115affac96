"""The prediction against the running decoder."""
