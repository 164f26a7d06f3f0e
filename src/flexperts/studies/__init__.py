"""Comparisons: many runs of one recipe beside each other, and what they come to."""
