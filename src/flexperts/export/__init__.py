"""Export of a run's models as folders for other tools: transformers, PEFT."""
