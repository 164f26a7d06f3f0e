"""The server's side: participants, accepted replies, averaging. It reads no data rows and loads no model."""
