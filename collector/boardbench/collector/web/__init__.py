"""The HTTP face of the collector."""
