"""Runs examples/serve.py in a process of its own: it makes Keras and tfbn unavailable there."""

from __future__ import annotations

import contextlib
import io
import subprocess


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Returns how the program ended, as if it had a process for itself."""
    from examples import serve

    status: object
    with (
        contextlib.redirect_stdout(io.StringIO()) as output,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        try:
            status = serve.main(arguments)
        except SystemExit as ended:
            status = ended.code
    if isinstance(status, str):  # `sys.exit` prints it.
        errors.write(status)
        status = 1
    return subprocess.CompletedProcess(arguments, int(status), output.getvalue(), errors.getvalue())
