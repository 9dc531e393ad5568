"""What the licence of a model allows, as far as the metadata of its card tells: may a quantized copy be published?"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qformat import strict_json

_NO_DERIVATIVES = re.compile(r"(?:^|[-_ ])nd(?:[-_ ]|$)", re.IGNORECASE)
_UNNAMED = frozenset({"other", "unknown"})


@dataclass(frozen=True, slots=True)
class License:
    """The licence fields of a model card. identifier: as the Hub spells it, `other` with a name and a link."""

    identifier: str | None = None
    name: str | None = None
    link: str | None = None

    @classmethod
    def of_metadata(cls, metadata: dict[str, strict_json.Json]) -> License:
        """Take the licence from a card's metadata; several licences count as one that must be looked at."""
        identifier = metadata.get("license")
        if isinstance(identifier, list):
            identifier = ", ".join(str(one) for one in identifier)
        name, link = metadata.get("license_name"), metadata.get("license_link")
        return cls(
            identifier if isinstance(identifier, str) and identifier else None,
            name if isinstance(name, str) and name else None,
            link if isinstance(link, str) and link else None,
        )

    def concern(self) -> str | None:
        """Return why somebody has to look at the licence before a 4-bit copy is published, or None."""
        if self.identifier is None:
            return "the source names no licence: without one, nobody may publish copies of it"
        if any(_NO_DERIVATIVES.search(text) for text in (self.identifier, self.name or "")):
            return f"the licence {self.name or self.identifier} forbids derivatives, and a 4-bit copy may be one"
        if self.identifier.lower() in _UNNAMED and self.link is None:
            return f"the source's licence is {self.identifier!r} and has no link to its text"
        if "," in self.identifier:
            return f"the source names several licences ({self.identifier})"
        return None

    def as_metadata(self) -> dict[str, str]:
        """Return the fields of a card."""
        fields = {"license": self.identifier, "license_name": self.name, "license_link": self.link}
        return {name: value for name, value in fields.items() if value is not None}
