"""``python -m fastmatch``: the same as the ``fastmatch`` command."""

from fastmatch.cli.start import start

raise SystemExit(start())
