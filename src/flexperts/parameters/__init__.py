"""Who owns which parameter: shared, personal or frozen; and personal state at rest."""
