"""Save and load the training state."""
