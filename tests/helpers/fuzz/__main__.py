"""Random assignment problems against scipy.

    PYTHONPATH=tests python -m helpers.fuzz --seed 824 --problems 2000
    PYTHONPATH=tests python -m helpers.fuzz --seconds 60
    PYTHONPATH=tests python -m helpers.fuzz --seed 7 --only 123      one problem again, in this process

A failure is printed with its seed and number. The exit status is 1 if there was one.
"""

import sys

from helpers.fuzz.run import main

if __name__ == "__main__":  # the processes that it starts import this module too
    sys.exit(main())
