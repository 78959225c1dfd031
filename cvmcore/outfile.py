"""A file that is there whole or not at all: written under another name beside its own, and renamed at the end."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from cvmcore.errors import InputError


class OutFile:
    """A context manager: on success the file takes its name, else nothing is left and what was there stays.

    Raises InputError where the file cannot be written. A link stays a link.
    """

    def __init__(self, path: Path, *, binary: bool = False) -> None:
        self.path = path
        self._target = Path(os.path.realpath(path))
        self._partial = self._target.with_name(f".{self._target.name}.{os.getpid()}.partial")
        if self._target.exists() and not self._target.is_file():
            raise InputError(f"{path}: cannot be written: it is no regular file")
        try:
            # Closed in __exit__.
            self._file: IO[Any] = (
                open(self._partial, "wb") if binary else open(self._partial, "w", encoding="utf-8")  # noqa: SIM115
            )
        except OSError as error:
            raise self._cannot(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._file.close()
            if kind is None:
                os.replace(self._partial, self._target)
        except OSError as failed:
            raise self._cannot(failed) from None
        finally:
            self._partial.unlink(missing_ok=True)

    def give_up(self) -> None:
        """Leave nothing behind; what was there stays."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def put(self, data: str | bytes) -> None:
        """Write, text or bytes as the file was opened."""
        try:
            self._file.write(data)
        except OSError as error:
            raise self._cannot(error) from None

    def _cannot(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: cannot be written: {error.strerror or error}")
