"""The program on the board: receives models, runs them, measures, keeps and streams results."""
