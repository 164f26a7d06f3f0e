"""Rows of every client: sources, columns, prompts, and the silo data that ships."""
