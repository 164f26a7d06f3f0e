"""The HTTP server: OpenAI's chat completions, keys, limits, metrics."""
