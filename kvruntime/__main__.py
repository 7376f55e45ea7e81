"""The command ``kvruntime``, and ``python -m kvruntime``."""

from __future__ import annotations

import sys

from kvruntime.extras import extra


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        with extra("cli"):
            from kvruntime.cli import main as run
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
