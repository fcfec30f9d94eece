"""What the board is and what its sensors say."""
