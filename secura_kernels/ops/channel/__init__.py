"""The space ``channel``: one gain an output row."""
