"""Messages between clients and server: encoding, averaging, byte counts."""
