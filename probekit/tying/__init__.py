"""What tied and untied embeddings do to the lens, and how sure the figures of a trace are."""
