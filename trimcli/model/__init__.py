"""A model without its weights: skeleton, names, prunable matrices, and the forward pass around its layers."""
