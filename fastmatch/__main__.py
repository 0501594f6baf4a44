"""``python -m fastmatch``: the same as the ``fastmatch`` command."""

from fastmatch.cli.main import main

raise SystemExit(main())
