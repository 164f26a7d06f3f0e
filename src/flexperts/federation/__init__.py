"""Flower apps, the in-process grid and the run."""
