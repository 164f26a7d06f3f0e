"""The parts of a MoE model: experts modules, attention projections, routers."""
