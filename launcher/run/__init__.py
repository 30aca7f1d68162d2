"""The life of a run folder: create, resume, stop, status. Imports no torch."""
