"""What the residual stream knows, and what happens when it is changed."""
