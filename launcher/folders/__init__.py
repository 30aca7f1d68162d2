"""Names on disk: run folders, checkpoints, models, adapters, kinds of folders. No torch."""
