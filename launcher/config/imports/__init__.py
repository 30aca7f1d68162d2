"""Settings of other trainers as Shardway's: `shardway import`."""
