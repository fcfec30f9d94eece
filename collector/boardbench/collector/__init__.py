"""The program on your side: takes results from many boards, stores them, exposes them."""
