"""Reports: what an alignment, a merge or a renormalization did, as a page to look at and as text for a terminal.

``measures`` computes numbers, ``structure`` what moves together, ``pictures`` geometry and images; ``page`` fills the
templates; ``alignment`` and ``merge`` put a :class:`Report` together.
"""
