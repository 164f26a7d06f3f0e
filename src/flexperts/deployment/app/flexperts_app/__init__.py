"""What travels to a SuperLink."""
