"""What updates reveal: attacks on the updates of simulated rounds, by someone who has all rows in one process."""
