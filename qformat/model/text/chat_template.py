"""The chat template of a tokenizer, applied to conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qformat.errors import UsageError
from qformat.model.text import template_language
from qformat.model.text.render_client import Rendering, Template
from qformat.model.text.rendering import file_of_template, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "qformatprobe"

Messages = Sequence[Mapping[str, Any]]
"""Messages with `role` and, if they have content, a string as `content`."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template.

    Attributes:
        template: The template with its settings.
    """

    template: Template

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, source: str) -> ChatTemplate:
        """Return an instance after a test of the form in which the template reads content.

        Args:
            tokenizer: Tokenizer that applies the template.
            source: The template.

        Raises:
            ArtifactError: The template exceeds a limit.
        """
        file, variables = file_of_template(tokenizer), template_language.plain(tokenizer.special_tokens_map)
        plain, parts = (cls(Template(source, file, variables, reads_parts)) for reads_parts in (False, True))
        return parts if not plain._shows_the_probe() and parts._shows_the_probe() else plain

    def rendering(
        self,
        messages: Messages,
        *,
        tools: Sequence[Any] | None = None,
        variables: dict[str, Any] | None = None,
        ask: bool = False,
    ) -> Rendering:
        """Return a conversation that is to be rendered with this template.

        Args:
            messages: Messages of the conversation.
            tools: Tools that the assistant may call, or None.
            variables: Variables of the template by name.
            ask: Whether to end with the header of an answer.
        """
        return Rendering(self.template, messages, tools, variables or {}, ask)

    def _shows_the_probe(self) -> bool:
        try:
            text = render(self.rendering([{"role": "user", "content": _PROBE}], ask=True)).text
        except UsageError:
            return False
        return _PROBE in text and repr(_PROBE) not in text  # a template for strings prints Python's form of a list
