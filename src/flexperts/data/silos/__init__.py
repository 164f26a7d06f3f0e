"""The data that ships: four silos whose house styles give different answers for the same office notes."""
