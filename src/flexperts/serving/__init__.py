"""All clients of a finished run at once, from one resident base."""
