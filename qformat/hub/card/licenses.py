"""Licence of a model according to the metadata of its card, and whether it may forbid publishing a quantized copy."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qformat import strict_json

_NO_DERIVATIVES = re.compile(r"(?:^|[-_ ])nd(?:[-_ ]|$)", re.IGNORECASE)
_UNNAMED = frozenset({"other", "unknown"})


@dataclass(frozen=True, slots=True)
class License:
    """Licence fields of a model card.

    Attributes:
        identifier: The Hub's identifier of the licence. `other` comes with a name and a link.
        name: Name of a licence without an identifier on the Hub.
        link: URL or file of the text of the licence.
    """

    identifier: str | None = None
    name: str | None = None
    link: str | None = None

    @classmethod
    def of_metadata(cls, metadata: dict[str, strict_json.Json]) -> License:
        """Return the licence that a card's metadata states. Several licences are joined with commas."""
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
        """Return why a person must check the licence before a 4-bit copy is published, or None."""
        if self.identifier is None:
            return "the source does not state a licence, and without one nobody may publish copies"
        if any(_NO_DERIVATIVES.search(text) for text in (self.identifier, self.name or "")):
            return (
                f"the licence {self.name or self.identifier} forbids derivatives, and a 4-bit copy may be a derivative"
            )
        if self.identifier.lower() in _UNNAMED and self.link is None:
            return f"the source's licence is {self.identifier!r}, without a link to its text"
        if "," in self.identifier:
            return f"the source states several licences ({self.identifier})"
        return None

    def as_metadata(self) -> dict[str, str]:
        """Return the licence as metadata fields of a model card."""
        fields = {"license": self.identifier, "license_name": self.name, "license_link": self.link}
        return {name: value for name, value in fields.items() if value is not None}
