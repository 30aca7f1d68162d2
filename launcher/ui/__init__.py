"""The web page: train, watch runs, chat, export. It shows folders; other processes do the work."""
