"""A causal language model in use: loading it, running it."""
