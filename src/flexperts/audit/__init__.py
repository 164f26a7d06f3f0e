"""What updates reveal: attacks on the updates of simulated rounds, by whoever has all rows in one process."""
