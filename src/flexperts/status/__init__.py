"""Where a run is, read from its directory: as JSON, and as a page that follows it."""
