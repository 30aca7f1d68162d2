"""What a run leaves behind. `layout` imports no torch."""
