"""The modules of `bench_peers.py`. `hf`, `trl` and `llamafactory` run in the environments of the
peers, without Shardway: from this package they import only `job` and `count`."""
