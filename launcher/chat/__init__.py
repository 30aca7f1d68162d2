"""Talk to a model: an export, any model folder, an adapter on its base."""
