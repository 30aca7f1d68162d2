"""Where ranks run. Imports no torch."""
