"""Preference annotation by customized density ratios, on Spark (arXiv 2411.02481)."""
