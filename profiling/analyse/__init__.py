"""Draws conclusions from results files: comparisons, goals, projections."""
