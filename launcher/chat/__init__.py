"""Chat with a model: an export, any model folder, or an adapter on its base model."""
