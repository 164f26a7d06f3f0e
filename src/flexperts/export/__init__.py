"""A run's models as folders that other tools read: transformers, PEFT."""
