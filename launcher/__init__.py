"""Shardway: launch sharded fine-tuning, land a folder that a server can load."""
