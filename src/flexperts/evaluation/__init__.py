"""Scores of one client: ROUGE-L, response NLL, MMLU; and how sure a difference between two methods is."""
