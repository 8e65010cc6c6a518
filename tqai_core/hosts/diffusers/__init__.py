"""diffusers: step skipping, blocks and attention."""
