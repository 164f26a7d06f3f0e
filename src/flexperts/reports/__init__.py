"""What a comparison looks like: tables and plots, as an HTML page and as Markdown."""
