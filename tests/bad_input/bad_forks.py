"""Commands in processes of their own, without paying for the imports each time.

Contract: `Forks` starts this file once as a program; it imports the command line and then forks
itself for every command, so each runs `main` in a real process with real streams: it can be killed,
limited, or run as another user. The parent of the forks does nothing else, so no thread is lost.
"""

import builtins
import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Forks:
    """The running program. Use it in a `with` statement."""

    def __enter__(self) -> "Forks":
        self._program = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._program.communicate()

    def run(
        self,
        words: list[str],
        *,
        die_at: int | None = None,
        die_of: int = signal.SIGKILL,
        largest_file: int | None = None,
        powerless: bool = False,
    ) -> Any:
        """(exit status, stdout, stderr, steps); a signal is a negative status.

        `die_at`: the signal `die_of` at that step, a step being the moment before a file is synced,
        renamed or appended to, or a folder made, after one is opened to be written, and the end.
        `largest_file`: bytes a file may
        have, as on a full disk. `powerless`: without the right to pass over permissions that root
        has.
        """
        job: dict[str, Any] = {
            "words": words,
            "die_at": (die_at, die_of),
            "largest_file": largest_file,
        }
        job["powerless"] = powerless
        assert self._program.stdin and self._program.stdout
        self._program.stdin.write(json.dumps(job) + "\n")
        self._program.stdin.flush()
        return json.loads(self._program.stdout.readline())


def _serve() -> None:
    import pyarrow as pa

    import pivottrace_verl.annotation.oracle
    import pivottrace_verl.doctor
    import pivottrace_verl.planning
    import pivottrace_verl.report
    import pivottrace_verl.scoring
    import pivottrace_verl.triage  # noqa: F401
    from pivottrace_verl.cli import main

    # What the first command would import lazily, the forks would import every time.
    pa.Table.from_pylist([{"a": [1]}])
    sys.argv = ["pivottrace", "probe", os.devnull]
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(open(os.devnull, "w")):
        main()
    for line in sys.stdin:
        job = json.loads(line)
        out, err, steps = pipes = [os.pipe() for _ in range(3)]
        child = os.fork()
        if child == 0:
            os.dup2(out[1], 1)
            os.dup2(err[1], 2)
            sys.stdout, sys.stderr = (open(fd, "w") for fd in (1, 2))  # noqa: SIM115
            _child(job, main, steps[1])
        texts = []
        for read, write in pipes:
            os.close(write)
            with os.fdopen(read, "rb") as pipe:
                texts.append(pipe.read().decode(errors="replace"))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, *texts[:2], len(texts[2])]), flush=True)


def _child(job: dict[str, Any], main: Callable[[], Any], steps: int) -> None:
    sys.argv = ["pivottrace", *job["words"]]
    # A test run in the background of a shell inherits "ignore Ctrl-C", and so would the fork.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if job["largest_file"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
    if job["powerless"]:
        # Version 3 of the header, this process; no capability of any sort.
        ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    step = _count(steps, *job["die_at"])
    status = 1
    try:
        main()
        step()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException as error:  # noqa: BLE001
        import traceback

        traceback.print_exception(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _count(steps: int, die_at: int | None, die_of: int) -> Callable[..., None]:
    """Write a byte to `steps` at each call that changes what a later process will see, and at each
    call of what is returned; die at one.

    What a dead process wrote stays in the page cache, so nothing is synced.
    """
    done = 0
    real = os.write

    def step(_event: object = None) -> None:
        nonlocal done
        done += 1
        if done - 1 == die_at:
            os.kill(os.getpid(), die_of)
        real(steps, b".")

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            step()
            return call(*args, **kwargs)

        return wrapper

    for name in ("write", "replace", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    os.fsync = step
    real_open = builtins.open

    def opened(*args: Any, **kwargs: Any) -> Any:
        file = real_open(*args, **kwargs)
        if len(args) > 1 and "w" in args[1]:
            step()
        return file

    builtins.open = opened
    return step


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    _serve()
