"""The space ``activation``: S-MagNorm on the layer's output."""
