"""The table times the costs: which way to draft, how sure that is, and how to hand it on."""
