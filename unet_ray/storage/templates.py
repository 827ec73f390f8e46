"""A path with `{}` in it stands for all files whose path is the same but for the text in each place of `{}`.

>>> split_template("/a2d2/{}/camera/{}_camera_{}.png")
('/a2d2', '{}/camera/{}_camera_{}.png')
"""

from __future__ import annotations

import re

from unet_ray import storage
from unet_ray.storage import overlaps

BRACES = "{}"
"""Any text within the name of one folder or file; at least one letter."""


def is_template(uri: str) -> bool:
    """Whether a path is a template, not the name of something on this machine."""
    return BRACES in uri and not (storage.is_local(uri) and storage.exists(storage.resolve(uri)))


def split_template(uri: str) -> tuple[str, str | None]:
    """Returns the folder in which a template looks and the template below it; a folder itself and None."""
    if not is_template(uri):
        return uri, None
    folder = uri.partition(BRACES)[0].rpartition("/")[0]
    return folder or "/", uri[len(folder) :].removeprefix("/")


def require_alike(images: tuple[str, str], masks: tuple[str, str], *, has_suffix: bool) -> None:
    """Refuses templates of frames and masks that cannot be compared.

    Args:
        images: the option and its value.
        masks: the same of the masks.
        has_suffix: whether --image-suffix or --mask-suffix is given.

    Raises:
        ValueError: one line.
    """
    are_templates = [is_template(uri) for _, uri in (images, masks)]
    if not any(are_templates):
        return
    if not all(are_templates) or images[1].count(BRACES) != masks[1].count(BRACES):
        counts = [f"{option} has {uri.count(BRACES)}" for option, uri in (images, masks)]
        raise ValueError(
            f"{' and '.join(counts)} {{}}; a frame's mask has the same texts in place of them, so give both as many"
        )
    if has_suffix:
        raise ValueError(f"{images[0]} has {{}}; put --image-suffix and --mask-suffix into the two patterns")


def require_out_apart(out: str, option: str, uri: str) -> None:
    """Refuses an output around the folder of a template, or in a place whose files the template would match.

    Raises:
        ValueError: one line that names both.
    """
    folder, template = split_template(storage.resolve(uri))
    assert template is not None, uri
    real_out, real_folder = (overlaps.real_uri(path) for path in (storage.resolve(out), folder))
    if overlaps.lies_in(real_folder, real_out):
        raise ValueError(f"{option} {uri} lies in --out {out}; give an --out beside it")
    if overlaps.lies_in(real_out, real_folder):
        below = real_out.removeprefix(real_folder.rstrip("/") + "/")
        if any(template_pattern(template).fullmatch(f"{below}/{name}") for name in _PICTURES):
            raise ValueError(f"--out {out} lies in what {option} {uri} matches; give a place beside it")


_PICTURES = tuple(f"{name}{end}" for name in ("curves", "samples", "confusion") for end in ("", ".png"))
"""Images that a training or an evaluation writes into its folder, with and without extension."""


def template_pattern(template: str) -> re.Pattern[str]:
    """Returns the regular expression of a template, with a group for each of its places."""
    return re.compile("([^/]+)".join(re.escape(part) for part in template.split(BRACES)))
