"""The program on the laptop: push, run, compare, inspect."""
