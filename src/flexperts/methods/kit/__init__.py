"""Code that methods share: their base class, a client's turn, the server's state, and common steps."""
