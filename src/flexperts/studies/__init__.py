"""Comparisons: many runs of one recipe, and their results side by side."""
