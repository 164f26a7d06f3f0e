"""The local step of one client."""
