"""The process group and what travels over it."""
