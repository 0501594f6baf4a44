"""Evaluation: scores, curves, triangles, layer tables, distances."""
