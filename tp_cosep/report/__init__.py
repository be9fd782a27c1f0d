"""Views of what was pruned: tables, measurements, plots and a page."""
