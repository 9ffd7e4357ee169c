"""The step of the optimizers: grouping of parameters into buckets, their state, and their update."""
