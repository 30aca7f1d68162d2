"""Shardway: launch sharded fine-tuning and export a folder that a server can load."""
