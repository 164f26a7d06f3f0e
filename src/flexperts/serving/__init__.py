"""Serving of all clients' models of a finished run from one resident base."""
