"""Entry points of the command line; each reads like a recipe."""
