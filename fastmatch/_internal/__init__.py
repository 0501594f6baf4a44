"""What every package shares: states, batches, files, progress."""
