"""A whole merge from one recipe: align, merge, renormalize, evaluate, report.

``recipe`` reads and checks what is asked for, ``pipeline`` does it, ``card`` describes the output.
"""
