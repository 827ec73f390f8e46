"""Files of a web server: read by range, and listed from the pages that it makes of its folders.

fsspec's filesystem for HTTP says of a server that is down, and of whatever else it meets, that a file is not there
(`filesystems.naming` tells these apart), passes over folders that it cannot list, and takes a whole file for the range
where a server knows no ranges. So what it says of size, links and status is used, and its errors are looked behind.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import fsspec.asyn

from unet_ray.storage.filesystems import persistently


def is_web(uri: str) -> bool:
    """Whether the URI is read by fsspec's filesystem for HTTP."""
    return uri.startswith(("http://", "https://"))


def read(fs: Any, uri: str, offset: int, size: int | None) -> bytes:
    """Returns `size` bytes from `offset`, all without one; fewer where the file ends."""
    if size == 0:
        return b""
    end = None if size is None else offset + size
    options = {**fs.kwargs}
    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
    if offset or end is not None:
        headers["Range"] = f"bytes={offset}-{'' if end is None else end - 1}"

    async def fetch() -> bytes:
        session = await fs.set_session()
        async with session.get(fs.encode_url(uri), headers=headers, **options) as answer:
            if answer.status == 416:  # it ends before
                return b""
            fs._raise_not_found_for_status(answer, uri)
            data = await answer.read()
            return data if answer.status == 206 else data[offset:end]

    return fsspec.asyn.sync(fs.loop, fetch)


def look(fs: Any, uri: str) -> dict[str, Any]:
    """Returns what the server says of a file; its size by reading it where the server does not say that."""
    entry = fs.info(uri)
    return entry if entry["size"] is not None else {**entry, "size": len(read(fs, uri, 0, None))}


def walk(fs: Any, root: str, depth: int | None = None) -> tuple[list[str], list[str]]:
    """Returns the URIs of files and of folders below a folder, by the links of its pages and of those below.

    Args:
        fs: the filesystem.
        root: the folder.
        depth: how many levels of pages are read; all without one.
    """
    base = f"{root.rstrip('/')}/"
    files: list[str] = []
    folders: list[str] = []
    level, known = [base], {base}
    while level and depth != 0:
        links = [entry["name"] for folder in level for entry in persistently(folder, partial(fs.ls, folder))]
        links = [link for link in dict.fromkeys(links) if link.startswith(base) and link not in known]
        known.update(links)
        level = [link for link in links if link.endswith("/")]
        files += [link for link in links if not link.endswith("/")]
        folders += [link.rstrip("/") for link in level]
        depth = None if depth is None else depth - 1
    return sorted(files), sorted(folders)
