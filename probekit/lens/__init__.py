"""The logit lens: residuals to logits, exit heads, the early-exit training recipe, per-token statistics."""
