"""The schema of conf/: one module for each group of settings."""
