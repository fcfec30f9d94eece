"""What a model file says without being run. Standard library only; used by board and laptop."""
