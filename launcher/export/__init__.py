"""Offline consolidation: turns any result of training into a folder that a server can load.

The steps: `source` recognizes the input, `io.readers` describe its tensors, `assemble` dequantizes,
names, merges and casts them, `plan` assigns each tensor to a file, and `writing` writes the files,
reads them back and renames the folder. No step loads a model: a `Tensor` describes where rows come
from, and only the rows that are being written are in memory.
"""
