"""The web page: train, look after runs, chat, export. It views folders; others do the work."""
