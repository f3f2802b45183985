"""Shows a run: tables, figures, one HTML page."""
