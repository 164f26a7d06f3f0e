"""A run by one call from Python, and the models that it makes."""
