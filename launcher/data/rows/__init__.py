"""Raw rows as conversations."""
