"""The ops: one a file, each with its equation, its PyTorch reference, its Triton kernels and its gradient."""
