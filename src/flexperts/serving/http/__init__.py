"""The HTTP front: OpenAI's chat completions, keys, limits, metrics."""
