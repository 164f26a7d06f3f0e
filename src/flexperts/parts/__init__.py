"""What is attached to a base model: personal experts, adapters, router changes."""
