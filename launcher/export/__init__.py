"""Offline consolidation: any result of training in, a folder that serves out.

Never imports loop, strategy or cluster. The path of a tensor: `source` finds what there is, `plan`
decides every output tensor and its shard, `write` streams the bytes, `verify` checks the result.
"""
