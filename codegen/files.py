"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to `path` at the end, removed when the block raises.

    A reader sees the old file or the new one, never a part. Raises PermissionError, with the next
    step, where it cannot be written.
    """
    target = Path(path)
    part = target.with_name(f".{target.stem}.{os.getpid()}-{secrets.token_hex(4)}.part{target.suffix}")
    try:
        yield part
        os.replace(part, target)
    except OSError as error:
        raise PermissionError(
            f"cannot write {target}: {error}. Give a path in a folder that you can write to"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` as UTF-8 through :func:`whole_file`; returns the path."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)
