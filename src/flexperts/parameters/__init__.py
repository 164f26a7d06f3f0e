"""Parameter groups (shared, personal, frozen) and stored personal state."""
