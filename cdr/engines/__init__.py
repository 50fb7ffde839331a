"""Engines: loaded models that give token log-probs and samples."""
