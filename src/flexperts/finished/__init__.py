"""What a finished run is used for: its models, new clients, scores on other rows."""
