"""The process group, and the communication between ranks."""
