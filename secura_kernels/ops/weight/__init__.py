"""The space ``weight``: S-MagNorm on the weight itself."""
