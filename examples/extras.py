"""The error for a missing package that only an extra of tfbn installs."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def from_extra(extra: str) -> Iterator[None]:
    """Wraps imports: if one fails, the error names the extra of tfbn that installs the package.

    Raises:
        ImportError: in place of the original one, with the command that installs the extra.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"This needs a package that tfbn alone does not bring. Received: {error}. "
            f"Install it: pip install tfbn[{extra}] (in a checkout: pip install '.[{extra}]')."
        ) from error
