"""transformers: packed KV caches."""
