"""Merging aligned models: averages, partial merges, zipped units."""
