"""Selection of the experts that become personal."""
