"""What has to happen before any test module is imported."""

import contextlib

import pytest

with pytest.MonkeyPatch.context() as patch:
    # Triton's own library can be interpreted, as tests/attention/test_kernel.py does, only if this
    # is set when it is first imported in a process, and other modules import it.
    patch.setenv("TRITON_INTERPRET", "1")
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401
