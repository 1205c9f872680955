"""P = C U, which every space starts from, and its gradient."""
