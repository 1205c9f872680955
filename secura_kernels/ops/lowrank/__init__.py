"""The space ``none`` and what ``channel`` ends in: a thin product added to the frozen output."""
