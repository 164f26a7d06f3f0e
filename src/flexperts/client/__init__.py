"""Where rows are: one client's base, rows, personal state, and its answers to the server."""
