"""Linear algebra on batches of matrices ``(..., p, n)``. Depends on torch only."""
