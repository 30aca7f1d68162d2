"""Reading checkpoint files lazily, tensor by tensor."""
