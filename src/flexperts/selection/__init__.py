"""How the experts that become personal are chosen."""
