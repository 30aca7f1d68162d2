"""The subcommands of `shardway`, one module each, imported when it is called."""
