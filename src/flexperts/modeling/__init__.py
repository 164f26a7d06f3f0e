"""Loading and running a causal language model."""
