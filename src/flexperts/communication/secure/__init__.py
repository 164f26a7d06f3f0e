"""Secure aggregation: a protocol by which the server learns the sum of updates, and no single one."""
