"""The client's side: its base, data rows, personal state, and its answers to the server."""
