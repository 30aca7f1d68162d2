"""Merge and re-shard a run into a folder that serves: the same as `shardway consolidate`."""

from launcher.export.cli import main

if __name__ == "__main__":
    main()
