"""Which frame and which mask belong together by their names: the same path but for suffix and extension, or patterns.

>>> rule = NameRule(uri="/a2d2/{}/label/{}_label_{}.png", what="masks")
>>> rule.folder, rule.key("20180807/label/2018_label_07.png")
('/a2d2', '20180807/2018/07')
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from unet_ray.frames import IMAGE_EXTENSIONS, extension
from unet_ray.storage import templates


@dataclass(frozen=True, kw_only=True)
class NameRule:
    """How the paths of frames, or of masks, say which of them belong together."""

    uri: str
    """The folder, or a path with `{}` in it (see `templates`); resolved."""
    what: str
    """`frames` or `masks`."""
    suffix: str = ""
    """End of a name before the extension that the partner's name lacks."""

    @cached_property
    def folder(self) -> str:
        """The folder that is searched, at any depth."""
        return templates.split_template(self.uri)[0]

    @cached_property
    def template(self) -> str | None:
        """The pattern below that folder; None where the folder alone was given."""
        return templates.split_template(self.uri)[1]

    @property
    def rank(self) -> tuple[int, int]:
        """How particular the rule is; a file that both rules fit belongs to the more particular one."""
        fixed = self.suffix if self.template is None else self.template.replace(templates.BRACES, "")
        return len(fixed), len(self.folder)

    @cached_property
    def _extension(self) -> str:
        end = extension(self.template or "")
        return end if end in IMAGE_EXTENSIONS else ""

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """For names as they are, and for names in the composed Unicode form (see `partners`)."""

        def compiled(text: str) -> re.Pattern[str]:
            if self.template is None:
                return re.compile(f"(.*){re.escape(text)}", re.DOTALL)
            return templates.template_pattern(text)

        text = self.suffix if self.template is None else self.template[: len(self.template) - len(self._extension)]
        return compiled(text), compiled(_composed(text))

    def key(self, path: str) -> str | None:
        """Returns what a frame and its mask have in common, None for a path that the rule does not fit.

        Args:
            path: relative to the folder; of an image.
        """
        if self._extension and extension(path) != self._extension:
            return None
        stem = path.rpartition(".")[0]
        as_it_is, composed = self._patterns
        match = as_it_is.fullmatch(stem) or composed.fullmatch(_composed(stem))
        return None if match is None else "/".join(match.groups())


def _composed(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def partners(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Returns for each name the same one among others, or the only one that differs from it by its Unicode form alone.

    A name with an umlaut is one text for a person and two for a file system: macOS writes the letter and its dots, most
    others one letter.
    """
    names, others = list(names), set(others)
    same = {name: name for name in names if name in others}
    left, right = (_by_form(name for name in side if name not in same) for side in (names, others))
    only = {left[form][0]: right[form][0] for form in left.keys() & right if len(left[form]) == len(right[form]) == 1}
    return same | only


def _by_form(names: Iterable[str]) -> dict[str, list[str]]:
    by_form: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_form[_composed(name)].append(name)
    return by_form
