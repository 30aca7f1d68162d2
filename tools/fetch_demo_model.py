"""Fetch the demo model into the cache: the same as `shardway fetch smollm2_135m`."""

from launcher.model.fetch import main

if __name__ == "__main__":
    main()
