"""One optimizer step and everything that it needs. `loop.py` is the only training loop."""
