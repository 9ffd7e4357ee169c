"""Optimizers of torch.optim with marked parameters constrained to a manifold."""
