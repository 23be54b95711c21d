"""Forms that sparse kernels read, and what running on them brings."""
