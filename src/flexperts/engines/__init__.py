"""Where clients are: a run's rounds with all clients in this process."""
