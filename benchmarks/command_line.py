"""The parser that the programs share."""

import argparse


def parser(module: str, text: str | None) -> argparse.ArgumentParser:
    """Returns a parser for `python -m MODULE` that shows the module's docstring as its help."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
