"""How the ops are looked at: self-checks, random layers, launches compiled without a GPU."""
