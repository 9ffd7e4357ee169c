"""How a parameter becomes constrained, and stays so."""
