"""Pandas functions that Spark ships to Python workers."""
