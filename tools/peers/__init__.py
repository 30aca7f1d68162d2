"""What `bench_peers.py` is made of. `hf`, `trl` and `llamafactory` run in the peers' own
environments, without Shardway: with `job` and `count` they import nothing else from here."""
