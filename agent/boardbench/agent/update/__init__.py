"""The half of an update that needs root. Standard library only: the system's own Python runs it."""
