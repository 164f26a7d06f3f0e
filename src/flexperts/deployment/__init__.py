"""Runs over many machines: a silo's resident worker, the relay in front of it, and the app for a SuperLink."""
