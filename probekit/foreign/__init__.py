"""What comes from outside, read and checked once. Nothing here needs torch."""
