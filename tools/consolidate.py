"""Merge and re-shard a run into a folder that servers load: the same as `shardway consolidate`."""

import sys

from launcher.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "consolidate")
    main()
