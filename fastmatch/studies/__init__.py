"""The demo, the study of the paper's claims, pruning, and the toy networks and data that they use."""
