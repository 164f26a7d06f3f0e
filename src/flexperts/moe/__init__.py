"""What is inside a MoE model: experts modules, attention projections, routing."""
