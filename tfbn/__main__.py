"""The command line: `python -m tfbn`."""

import sys

from tfbn._command_line.main import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m tfbn"))
