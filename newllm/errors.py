"""The one exception a person who uses newllm is meant to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType


class UserError(ValueError):
    """What went wrong and what to do about it, in one line; the command line prints it and exits with code 2."""


def one_line(message: object) -> str:
    """The message on a single line, whatever line breaks a library put into it."""
    return " ".join(str(message).split())


def os_reason(error: OSError) -> str:
    """The operating system's words for an error, without errno and without the path."""
    return error.strerror or one_line(error) or type(error).__name__


def typed_path(text: str) -> Path:
    """The path a person typed, `~` expanded. Raises UserError where `~name` is nobody's home."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: {one_line(error)}") from error


@contextmanager
def arguments_are_the_users(options: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Turn the ValueError or TypeError by which a library refuses an argument into a UserError; `options`: what a person types
    for those arguments."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        argument, colon, rest = one_line(error).partition(":")
        raise UserError(options.get(argument, argument) + colon + rest) from error
