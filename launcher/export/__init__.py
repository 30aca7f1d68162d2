"""Offline consolidation: any result of training in, a folder that serves out.

Never imports loop, strategy or cluster. The path of a tensor: `source` recognises what there is,
`readers` describe its tensors, `assemble` names, merges and casts them, `plan` gives each its file,
`result` streams the bytes, reads them back and puts the folder in its place. No step loads a model:
a `tensor.Tensor` says where rows come from, and only the rows being written exist.
"""
