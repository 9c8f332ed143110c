"""A dialect's request in the words of /v1/chat/completions, so that all checks exist once.

The reader of a dialect checks only what OpenAI's fields cannot say, and puts the rest into the body as it came. What
the readers of OpenAI's requests then refuse is named as the client wrote it: the translation remembers where each field
came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from peerd.api.errors import ApiError
from peerd.api.fields import Fields

T = TypeVar("T")


class Translation:
    """The body of a chat that is being translated."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._body: dict[str, Any] = {}
        self._origins: dict[str, str] = {}

    def put(self, name: str, value: Any, origin: str | None = None) -> None:
        """Set a field, which the client calls `origin`. A value that is None is left out."""
        if value is not None:
            self._body[name] = value
        if origin is not None:
            self.rename(name, origin)

    def copy(self, fields: Fields, *names: str) -> None:
        """Take over fields that the dialect shares with OpenAI's API."""
        for name in names:
            self.put(name, fields.take(name), f"{fields.path}.{name}" if fields.path else name)

    def add_message(self, origin: str, message: dict[str, Any], **inner: str) -> None:
        """Add a message, which the client calls `origin`. `inner`: what it calls fields of it."""
        path = f"messages[{len(self.messages)}]"
        self.messages.append(message)
        self.rename(path, origin)
        for name, own in inner.items():
            self.rename(f"{path}.{name}", own)

    def rename(self, path: str, own: str) -> None:
        """What lies at `path` in the body is at `own` in the client's."""
        self._origins[path] = own

    def read(self, read: Callable[[Fields], T]) -> T:
        """What `read` makes of the body. Raises ApiError."""
        messages = {"messages": self.messages} if self.messages else {}
        with self.naming():
            return read(Fields(self._body | messages))

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Errors in this block name the fields as the client wrote them."""
        try:
            yield
        except ApiError as error:
            raise self._renamed(error) from None

    def _renamed(self, error: ApiError) -> ApiError:
        if error.param is None:
            return error
        own = self._own(error.param)
        message = str(error).replace(error.param, own, 1)
        return ApiError(error.status, message, param=own, code=error.code, kind=error.kind, headers=error.headers)

    def _own(self, path: str) -> str:
        beginnings = [known for known in self._origins if path == known or path.startswith((f"{known}.", f"{known}["))]
        longest = max(beginnings, key=len, default="")
        return self._origins.get(longest, "") + path.removeprefix(longest)
