"""Use of a finished run: its models, new clients, scores on other rows."""
