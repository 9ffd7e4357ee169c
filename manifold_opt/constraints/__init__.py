"""Marking parameters with constraints, and keeping the marks."""
