"""Engines of a run: the rounds with all clients in this process."""
