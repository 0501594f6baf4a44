"""Helpers that every package shares: state dicts, batches, files, option checks, progress bars."""
