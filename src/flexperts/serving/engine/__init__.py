"""Generation: one resident base, every row with its own client's weights."""
