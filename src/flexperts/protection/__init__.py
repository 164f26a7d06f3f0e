"""What is done to an update on its way: clipped, noised, packed, and combined by robust rules."""
