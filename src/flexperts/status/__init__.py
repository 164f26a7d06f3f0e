"""Where a run is, read from its directory."""
