"""Texts of files cannot start markup: a Markdown parser that is not ours shows them as they are."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qformat.markdown import escaped, front_matter, link, printable, table

HOSTILE = [
    "<script>alert(1)</script>",
    "&lt;b&gt; &amp; &#60;",
    "**bold** _emphasis_ __strong__ ~~gone~~ `code` ``",
    "[text](javascript:alert(1)) ![image](http://x/y.png) [ref]: http://x",
    "a | b \\| c \\",
    "# heading\n## another\n---\n===",
    "https://evil.example/x www.evil.example <https://evil.example> me@evil.example @someone",
    "$$\\href{javascript:alert(1)}{x}$$",
    "{{ template }} {% tag %}",
    "\N{RIGHT-TO-LEFT OVERRIDE}gnp.exe \x1b[31m \x00 \u2028 next",
    "a_b_c tokenizer_config.json _x_ x_",
]


@pytest.fixture(scope="module")
def parser() -> object:
    return pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])


def shown(parser: object, text: str) -> tuple[list[str], str]:
    """Return the types of the tokens in a text of one line, and the text that a reader sees."""
    (block,) = [token for token in parser.parse(text) if token.type == "inline"]  # type: ignore[attr-defined]
    return [child.type for child in block.children], "".join(child.content for child in block.children)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=40))
@example("_")
@example("\\")
def test_any_text_in_a_cell_or_a_heading_is_shown_as_it_is(text: str) -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    types, seen = shown(parser, f"# x{escaped(text)}x")
    assert set(types) == {"text"} or set(types) <= {"text", "text_special"}
    assert seen == f"x{printable(text)}x"
    cells = [
        token for token in parser.parse(table(("a", "b"), [(escaped(text) or "-", "end")])) if token.type == "td_open"
    ]
    assert len(cells) == 2


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_shown_as_they_are(parser: object, text: str) -> None:
    types, seen = shown(parser, f"The name is {escaped(text)}.")
    assert set(types) <= {"text", "text_special"}
    assert seen == f"The name is {printable(text)}."
    assert "\n" not in escaped(text)
    assert "<" not in escaped(text)
    assert "://" not in escaped(text)


def test_names_of_files_stay_readable() -> None:
    assert escaped("special_tokens_map.json") == "special_tokens_map.json"
    assert escaped("model-00001-of-00002.safetensors") == "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("address", "made"),
    [
        ("https://example.org/a_(b)?x=1#y", "[it](https://example.org/a_%28b%29?x=1#y)"),
        ("LICENSE", "[it](LICENSE)"),
        ("https://example.org/ <script>", "[it](https://example.org/%20%3Cscript%3E)"),
        ("javascript:alert(1)", "it"),
        ("JaVaScRiPt:alert(1)", "it"),
        ("data:text/html,x", "it"),
        ("//evil.example/x", "it"),
        ("http://[", "it"),
        ("https://example.org/\n# heading", "it"),
    ],
)
def test_links_lead_to_web_pages_or_files_only(address: str, made: str) -> None:
    assert link("it", address) == made


@pytest.mark.parametrize(
    "text", [*HOSTILE, "---", "a: b", "- x", "\x85 \u2028", "!!python/object:os.system", "yes", "1e3"]
)
def test_metadata_is_read_back_as_it_was_written(text: str) -> None:
    made = front_matter({"base_model": text, "tags": ["lora", text]})
    assert made.startswith("---\n")
    assert made.endswith("\n---")
    inner = made.removeprefix("---\n").removesuffix("---")
    assert "---" not in inner.splitlines()
    assert not {*"<>&[]`"} & {*inner}
    assert yaml.safe_load(inner) == {"base_model": text, "tags": ["lora", text]}
