"""What has to happen before any test module is imported."""

import contextlib
import os

import pytest

# Where they are set, by a shell or by pytest-xdist, rich keeps the width of the first import.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)

with pytest.MonkeyPatch.context() as patch:
    # Triton's own library can be interpreted, as tests/attention/test_kernel.py does, only if this
    # is set when it is first imported in a process, and other modules import it.
    patch.setenv("TRITON_INTERPRET", "1")
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401
