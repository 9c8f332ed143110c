"""Translates the engine's errors into errors that travel, because `compute` knows no wire."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peerd.compute.errors import (
    ContextTooLongError,
    EngineError,
    InvalidStepError,
    NonFiniteError,
    NoRoomError,
    StepGapError,
    UnknownAdapterError,
)
from peerd.compute.training.memory import PassTooLargeError
from peerd.protocol.errors import (
    BadResult,
    ContextTooLong,
    InternalError,
    InvalidRequest,
    NoRoom,
    UnsupportedFeature,
)


@contextmanager
def wire_errors() -> Iterator[None]:
    """Inside this context, turn the engine's errors into PeerdErrors.

    StepGapError passes through: it is answered with a message of its own, `gap`, instead of an error.
    """
    try:
        yield
    except StepGapError:
        raise
    except NoRoomError as error:
        raise NoRoom(str(error), error.free_tokens) from None
    except PassTooLargeError as error:
        raise NoRoom(str(error)) from None
    except ContextTooLongError as error:
        raise ContextTooLong(str(error)) from None
    except UnknownAdapterError as error:
        raise UnsupportedFeature(str(error)) from None
    except InvalidStepError as error:
        raise InvalidRequest(str(error)) from None
    except NonFiniteError as error:
        raise BadResult(str(error)) from None
    except EngineError as error:
        raise InternalError(str(error)) from error
