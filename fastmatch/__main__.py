"""``python -m fastmatch``: the same as the ``fastmatch`` command."""

from fastmatch.cli import main

raise SystemExit(main())
