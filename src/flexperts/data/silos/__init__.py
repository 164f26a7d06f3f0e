"""Four silos whose house styles disagree about the same office notes: the data that ships."""
