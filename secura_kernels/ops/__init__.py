"""The ops, one folder a norm space: imports run down to ``lowrank``, ``project`` and ``common``."""
