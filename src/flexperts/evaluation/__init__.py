"""Scores of one client: ROUGE-L and response NLL."""
