"""Where the command line enters, `python -m steadyrank` too: Ctrl-C while everything loads ends it as well as later."""

import sys


def main() -> None:
    """Run the command line; see `steadyrank.cli.main`."""
    try:
        from .cli import main as run  # here, since it takes seconds, in which a person may think better of it

        run()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
