"""Permutations: apply, invert, compose, verify, save and load."""
