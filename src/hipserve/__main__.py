"""The command `hipserve`, and `python -m hipserve`: Ctrl-C ends it at any moment with code 130."""

from __future__ import annotations

import sys

INTERRUPTED = 130


def main() -> None:
    """Imports the commands, which takes a second, and runs what is asked for."""
    try:
        from hipserve.cli.main import main as command

        command()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
