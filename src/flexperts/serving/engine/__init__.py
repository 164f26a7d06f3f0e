"""Generation with one resident base, where every row uses the weights of its client."""
