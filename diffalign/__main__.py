"""`python -m diffalign`: the command line, where the `diffalign` program is not on the path."""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    sys.exit(main())
