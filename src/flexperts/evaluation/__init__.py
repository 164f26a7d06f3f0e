"""Scores of one client: ROUGE-L, response NLL, MMLU."""
