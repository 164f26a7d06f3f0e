"""A page that follows a run."""
