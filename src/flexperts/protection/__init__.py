"""Protections of an update between client and server: clipping, noise, packing, robust rules."""
