"""What the command lines of the programs have in common."""

import argparse


def parser(module: str, text: str | None) -> argparse.ArgumentParser:
    """For `python -m MODULE`, whose help is the text as it stands: the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
