"""The rules between settings. `table.py` has them all."""
