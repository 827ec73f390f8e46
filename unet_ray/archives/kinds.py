"""The frames in an archive of any kind: how each is listed, and how its bytes are read."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator

import pyarrow as pa

from unet_ray import storage
from unet_ray.archives.members import Broken, Findings, Member
from unet_ray.archives.parquet import list_parquet
from unet_ray.archives.parquet_files import TooMuch
from unet_ray.archives.tar import list_tar
from unet_ray.archives.zip import list_zip
from unet_ray.frames import extension


def list_members(file: storage.FileInfo, findings: Findings, image_column: str | None) -> Iterator[Member]:
    """Yields the frames of a tar, zip or Parquet file; what is not one goes to `findings`.

    Args:
        file: the archive.
        findings: where ignored members are counted, and what cannot be listed is named.
        image_column: the column of images in a Parquet file, None where it is to be found.

    Raises:
        StorageError: the store did not answer.
    """
    listers = {".tar": list_tar, ".zip": list_zip}
    lister = listers.get(extension(file.uri))
    try:
        if lister is None:
            yield from list_parquet(file, findings, image_column)
        else:
            yield from lister(file, findings)
        if storage.info(file.uri).version != file.version:
            raise Broken("changed while it was listed")
    except (Broken, tarfile.TarError, zipfile.BadZipFile, pa.ArrowException, TooMuch) as error:
        findings.refuse(file.uri, " ".join(str(error).split()) or "damaged")
    except FileNotFoundError:
        findings.refuse(file.uri, "vanished while it was listed")
    except (PermissionError, storage.NotAFile) as error:
        findings.refuse(file.uri, error.strerror or type(error).__name__)
