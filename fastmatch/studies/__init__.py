"""The demo, the study of the paper, toy networks and data."""
