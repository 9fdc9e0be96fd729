"""A user's command that is run for each alert that opens or gets worse: what it is about stands in its environment."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable

from align_audit.errors import ConfigurationError, first_line, plain, quoted
from align_audit.record.alert import Alert

SECONDS = 30.0
"""After which a command that is still running is ended."""


class AlertCommand:
    """Runs a command, and never through a shell: an alert's text is text, whatever stands in it.

    Args:
        words: the command and its arguments, quoted as in a shell.
        tell: is given a line where the command fails, once for each way that it does.

    Raises:
        ConfigurationError: no command can be read from these words.
    """

    def __init__(self, words: str, tell: Callable[[str], None], seconds: float = SECONDS) -> None:
        try:
            self._arguments = shlex.split(words)
        except ValueError as error:
            raise ConfigurationError(f"--exec: {first_line(error)} in {quoted(words)}") from None
        if not self._arguments:
            raise ConfigurationError("--exec: expected a command, such as --exec ./notify.sh; found none")
        self._tell, self._seconds = tell, seconds
        self._said: set[str] = set()

    def run(self, folder: str, alert: Alert) -> None:
        """Run it for an alert of the run in that folder, and wait until it is done.

        Its environment has ``ALIGN_AUDIT_RUN``, ``_RULE``, ``_LEVEL``, ``_STEP`` and ``_MESSAGE``; nothing stands on its
        standard input, and what it prints goes nowhere.
        """
        told = {"RUN": folder, "RULE": alert.rule, "LEVEL": alert.level, "STEP": alert.step, "MESSAGE": alert.message}
        # Control characters would be commands to the terminal that it is printed on.
        environment = {
            **os.environ,
            **{f"ALIGN_AUDIT_{name}": _encodable(plain(value)) for name, value in told.items()},
        }
        with tempfile.TemporaryFile() as errors:  # no pipe, which a child of it could hold open
            try:
                done = subprocess.run(
                    self._arguments,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    timeout=self._seconds,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                self._fail(f"is still running after {self._seconds:g} s and was ended")
                return
            except OSError as error:
                self._fail(f"cannot be run: {first_line(error)}")
                return
            if done.returncode:
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines()
                self._fail(f"ended with status {done.returncode}" + (f": {plain(lines[-1], 200)}" if lines else ""))

    def _fail(self, how: str) -> None:
        if how not in self._said:
            self._said.add(how)
            self._tell(f"--exec: {plain(self._arguments[0])} {how} (said once)")


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
