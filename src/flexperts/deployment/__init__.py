"""Runs over many machines: the resident worker of a silo, the relay in front of it, and what a SuperLink gets."""
