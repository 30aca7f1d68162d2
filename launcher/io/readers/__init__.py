"""One module for each file format: it returns name → `Tensor` without reading the values."""
