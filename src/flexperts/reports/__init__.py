"""Reports of a comparison: tables and plots, as an HTML page and as Markdown."""
