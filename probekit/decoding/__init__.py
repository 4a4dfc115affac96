"""Decoding: one interface, four methods; the lossless ones differ only in speed."""
