import torch

# The matrices here are small: one thread is faster, and does not wait for another on a busy machine.
torch.set_num_threads(1)
