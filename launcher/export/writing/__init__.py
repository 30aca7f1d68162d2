"""Writes a plan to a folder, with the files beside the weights, and verifies the result."""
