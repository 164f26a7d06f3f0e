"""What commands and runs from Python show of a run, in a terminal or a notebook."""
