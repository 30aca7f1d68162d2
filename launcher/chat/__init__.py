"""Talk to an exported folder."""
