"""The fuzz's command line: see :mod:`helpers.fuzz.run`."""

import sys

from helpers.fuzz.run import main

if __name__ == "__main__":  # the processes that it starts import this module too
    sys.exit(main())
