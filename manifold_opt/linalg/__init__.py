"""Linear algebra on batches of matrices ``(..., p, n)``. It needs torch only."""
