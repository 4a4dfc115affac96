"""What the steps of a round cost: measured, or from a roofline."""
