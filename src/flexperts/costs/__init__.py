"""What a method costs: bytes, parameters, memory, FLOPs and time, planned from a config and measured on a model."""
