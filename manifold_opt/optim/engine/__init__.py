"""The step: which parameters move together, their state, and how they move."""
