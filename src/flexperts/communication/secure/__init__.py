"""Secure aggregation: the silos' part and the server's part of a protocol by which the server learns a sum alone."""
