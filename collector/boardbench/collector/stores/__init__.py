"""The places where results live: one file each, all alike by ``store.ResultStore``."""
