"""Section of the model card for the manifest's optional member `evaluation` (spec section 7.1).

The member is informative. Figures in a known form are shown; everything else is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass

from qformat import strict_json
from qformat.artifact.manifest import JsonObject
from qformat.markdown import escaped, table


@dataclass(frozen=True, slots=True)
class _Figure:
    name: str
    title: str
    form: str

    def shown(self, text: JsonObject) -> str:
        """Return the figure of a text with its standard error, or a dash if the text has none."""
        found = text.get(self.name)
        mean = _number(found.get("mean")) if isinstance(found, dict) else _number(found)
        error = _number(found.get("standard_error")) if isinstance(found, dict) else None
        if mean is None:
            return "–"
        return format(mean, self.form) + ("" if error is None else f" ± {format(error, self.form)}")


_FIGURES = (
    _Figure("perplexity", "perplexity", ".3f"),
    _Figure("kl", "KL from the source checkpoint, nats per token", ".4f"),
    _Figure("top1_agreement", "same top token", ".2%"),
    _Figure("loss", "loss, nats per token", ".4f"),
    _Figure("source_loss", "loss of the source checkpoint", ".4f"),
    _Figure("loss_increase", "loss increase", ".4f"),
)


def evaluation_sections(evaluation: JsonObject | None) -> list[str]:
    """Return the heading, the table of figures per text and a note, or an empty list without figures."""
    if evaluation is None:
        return []
    texts = evaluation.get("texts")
    measured = [text for text in texts if isinstance(text, dict)] if isinstance(texts, list) else []
    figures = [figure for figure in _FIGURES if any(figure.shown(text) != "–" for text in measured)]
    if not measured or not figures:
        return []
    header = ("text", "tokens", *(figure.title for figure in figures))
    rows = [(_name(text), _count(text), *(figure.shown(text) for figure in figures)) for text in measured]
    note = "Measured by `qformat eval` on held-out text; ± is the standard error of the mean over windows."
    length = evaluation.get("window_length")
    if type(length) is int:
        note += f" Each window has {length:,} tokens."
    return ["## Evaluation", table(header, rows), note]


def _name(text: JsonObject) -> str:
    name = text.get("name")
    return escaped(name) if isinstance(name, str) and name else "–"


def _count(text: JsonObject) -> str:
    count = text.get("predicted_tokens")
    return f"{count:,}" if type(count) is int else "–"


def _number(value: strict_json.Json) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
