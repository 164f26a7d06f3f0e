"""Everything that can be set, one frozen section each."""
