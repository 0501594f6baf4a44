"""Programs in processes of their own, forked from one that has loaded what they import: that takes longer than they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["Forked"]

LIMIT = 300
"""Seconds after which a program is taken to hang: fewer than those after which the test's own process ends."""

SERVER = """
import json, os, signal, sys, tempfile
exec(sys.argv[1])
for line in sys.stdin:
    given = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    expired = []
    signal.signal(signal.SIGALRM, lambda *_: (expired.append(1), os.kill(child, signal.SIGKILL)))
    signal.alarm(given["limit"])
    status = os.waitpid(child, 0)[1]
    signal.alarm(0)
    print(json.dumps([os.waitstatus_to_exitcode(status), bool(expired)]), flush=True)
else:
    os._exit(0)
# The child: its interpreter ends as any other does.
signal.signal(signal.SIGALRM, signal.SIG_DFL)
for number, path in enumerate(given["outputs"], 1):
    os.dup2(os.open(path, os.O_WRONLY), number)
os.environ.clear()
os.environ.update(given["environment"])
sys.argv[:] = ["-c", *given["arguments"]]
sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in os.environ
tempfile.tempdir = None
if "numba" in sys.modules:
    sys.modules["numba"].core.config.reload_config()
exec(compile(given["code"], "<string>", "exec"))
"""


class Forked:
    """A process from which programs are forked, one after the other.

    A program has the modules that ``setup`` loads, and nothing else that another program did. What Python and libraries
    read from the environment when they start is what they read in the first process, numba's settings excepted.

    Args:
        setup: Code that is run once, in the process that is forked. It must start no thread.
    """

    def __init__(self, setup: str) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER, setup], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self,
        code: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        check: bool = False,
        limit: int = LIMIT,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``python -c code *arguments`` in an environment, by default this one.

        Raises:
            subprocess.CalledProcessError: the status is not 0, and ``check`` is true.
            subprocess.TimeoutExpired: the program did not end within ``limit`` seconds, and was killed.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            outputs = [Path(folder, name) for name in ("out", "errors")]
            for path in outputs:
                path.touch()
            given = {
                "code": code,
                "arguments": arguments,
                "environment": dict(os.environ if environment is None else environment),
                "outputs": list(map(str, outputs)),
                "limit": limit,
            }
            self._server.stdin.write(json.dumps(given) + "\n")
            self._server.stdin.flush()
            status, expired = json.loads(self._server.stdout.readline())
            done = subprocess.CompletedProcess(code, status, *(path.read_text() for path in outputs))
        if expired:
            raise subprocess.TimeoutExpired(code, limit, done.stdout, done.stderr)
        if check:
            done.check_returncode()
        return done

    def close(self) -> None:
        """End the process."""
        self._server.communicate()
