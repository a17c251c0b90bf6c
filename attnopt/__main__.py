"""Entry point of `attnopt` and of `python -m attnopt`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line on sys.argv and leave with its exit code."""
    from attnopt.cli import main as run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
