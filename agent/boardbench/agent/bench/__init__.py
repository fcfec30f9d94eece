"""The child process of one run: the standard library, NumPy and one engine, on any Python >= 3.9."""
