"""Who owns which rows: sources, columns, prompts, and the silo data that ships."""
