"""From a model folder to a module whose parameters wait on meta, and its tokenizer."""
