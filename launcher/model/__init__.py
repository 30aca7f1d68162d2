"""From a model folder to a module with its parameters on the meta device, and its tokenizer."""
