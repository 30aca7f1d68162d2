"""From files to batches of token ids. `source` imports no torch."""
