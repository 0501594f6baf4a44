"""Float64 inner products of permuted tensors."""
