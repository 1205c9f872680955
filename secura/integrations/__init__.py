"""SECURA as a plugin of other frameworks; each module imports the one it is named after."""
