"""Who drafts, and when to stop: the same objects serve prediction and decoding."""
