"""Shardway: launch sharded fine-tuning and export a folder that a server can load."""

import os

PARENT = os.getppid()  # read first of all: it changes when the parent dies (launcher/run/parent.py)
