"""Measures the other packages; none of them imports it."""
