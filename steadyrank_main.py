"""Where the `steadyrank` command enters: outside the package, so that Ctrl-C ends it while that loads, too."""

import sys


def main() -> None:
    """Run the command line; see `steadyrank.cli.main`."""
    try:
        from steadyrank.cli import main as run

        run()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
