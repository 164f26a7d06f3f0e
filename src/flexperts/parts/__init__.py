"""Parts that are attached to a base model: personal experts, adapters, router changes."""
