"""A run as a page: RUN.json, and the HTML that shows it."""
