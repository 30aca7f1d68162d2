"""One module a file format: each gives name → `Tensor` and copies no values."""
