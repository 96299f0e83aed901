"""What to say when a package that tfbn itself does not need is missing."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def from_extra(extra: str) -> Iterator[None]:
    """Wraps imports: where one fails, the error names the extra of tfbn that brings the package.

    Raises:
        ImportError: with the cure, in place of the one that was raised inside.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"This needs a package that tfbn alone does not bring. Received: {error}. "
            f"Install it: pip install tfbn[{extra}] (in a checkout: pip install '.[{extra}]')."
        ) from error
