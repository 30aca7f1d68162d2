"""How much memory a run needs, found out without a GPU and without weights."""
