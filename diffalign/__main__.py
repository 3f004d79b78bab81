"""The `diffalign` program, also as `python -m diffalign`. It imports the command line itself, so that Ctrl-C meanwhile is no traceback."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line on the program's arguments and returns its exit code."""
    try:
        from diffalign import cli

        return cli.main()
    except KeyboardInterrupt:
        print("diffalign: interrupted before anything was done; the same command starts again", file=sys.stderr)  # noqa: T201
        return 130


if __name__ == "__main__":
    sys.exit(main())
