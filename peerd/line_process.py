"""A process that answers lines of JSON, for work that may never end: threads cannot be killed.

Its standard input and output are pipes; each line that it reads is answered by one line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import trio

from peerd.protocol.errors import InternalError, InvalidRequest

# For importing what the process needs, which may take long on a loaded machine.
_START_LIMIT_S = 60.0
_CHUNK_BYTES = 65536
_MAX_ANSWER_BYTES = 64 * 1024 * 1024


class LineProcess:
    """A process, started when it is needed and killed when an answer takes too long."""

    def __init__(self, module: str, subject: str, limit_s: float) -> None:
        """module: what the process runs; it writes a line as soon as it is ready. subject: what takes too long or too
        much memory, as errors call it.
        """
        self._module = module
        self._subject = subject
        self._limit_s = limit_s
        self._process: trio.Process | None = None
        self._rest = b""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._process}>"

    async def ask(self, asked: bytes) -> dict[str, Any]:
        """The answer to a line of JSON. Raises InvalidRequest, InternalError."""
        await self._start()
        try:
            with trio.fail_after(self._limit_s):
                return await self._ask(asked)
        except trio.TooSlowError:
            await self.close()
            raise InvalidRequest(f"{self._subject} did not end within {self._limit_s:g} s") from None
        except (trio.BrokenResourceError, trio.EndOfChannel):
            await self.close()
            raise InvalidRequest(f"{self._subject} took more memory than it may") from None
        except BaseException:
            # Half an answer may be in the pipe.
            await self.close()
            raise

    async def close(self) -> None:
        """Kill the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                await pipe.aclose()

    async def _start(self) -> None:
        """Start the process if none is running. Raises InternalError."""
        if self._process is not None and self._process.poll() is None:
            return
        await self.close()
        self._rest = b""
        self._process = await trio.lowlevel.open_process(
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            with trio.fail_after(_START_LIMIT_S):
                await self._read_line()
        except BaseException as error:
            await self.close()
            if isinstance(error, trio.EndOfChannel | trio.TooSlowError):
                raise InternalError(f"the process {self._module} did not start") from error
            raise

    async def _ask(self, asked: bytes) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        await self._process.stdin.send_all(asked)
        answer: dict[str, Any] = json.loads(await self._read_line())
        return answer

    async def _read_line(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        parts = [self._rest]
        size = len(self._rest)
        while b"\n" not in parts[-1]:
            chunk = await self._process.stdout.receive_some(_CHUNK_BYTES)
            size += len(chunk)
            if not chunk or size > _MAX_ANSWER_BYTES:
                raise trio.EndOfChannel
            parts.append(bytes(chunk))
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line
