"""All the text that a run reads, as windows by role and class."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from nr_serve.train.digest import digest
from nr_serve.train.text.frames import Frames
from nr_serve.train.text.pack import Windows

CHAT = "chat"
"""The class of original text in the base's chat template."""


@dataclass(frozen=True)
class Classes:
    """Windows by role and class. A class's name is a source (`en.fortunes`) or a language."""

    target: Windows
    original: Mapping[str, Windows]
    background: Mapping[str, Windows]
    grams: Mapping[str, Tensor] = field(default_factory=dict)
    """The 8-grams of each class's text (see `overlap`), including `target`, int64 [G]."""
    frames: Frames = field(default_factory=Frames)
    """What the base's tokenizer puts around text; without a chat if the recipe has `chat = false`."""

    def digest(self, heldout: Mapping[str, Windows] | None = None) -> str:
        """16 hex digits that identify this text, its documents and each class's role.

        The text `heldout`, which is measured during the run, is included.
        """
        roles = {
            "target": {"target": self.target},
            "original": self.original,
            "background": self.background,
            "heldout": heldout or {},
        }
        content = [
            [role, name, digest((windows.ids_NT, windows.offset_NT)), *windows.ids_NT.shape]
            for role, classes in roles.items()
            for name, windows in classes.items()
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
