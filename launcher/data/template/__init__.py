"""Conversations as tokens, in the dialect of a chat template."""
