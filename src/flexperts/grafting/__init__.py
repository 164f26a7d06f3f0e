"""Selecting a pretrained expert and growing a personal one beside the router."""
