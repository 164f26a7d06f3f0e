"""Costs of methods: bytes, parameters, memory, FLOPs and time, planned from a config or measured on a model."""
