"""A page's examples are found in their order, with their commands, outputs and comments."""

from __future__ import annotations

from tools.docs.examples.page import Checking, Command, Console, File, Other, Script, Setup, parse


def test_commands_and_their_outputs() -> None:
    page = "# Title\n\n```console\n$ one\nfirst\n\nsecond\n\n$ two \\\n    --flag\nthird\n$ three\n```\n"
    (block,) = parse(page)
    assert block == Console(
        3,
        (
            Command(4, "one", ("first", "", "second"), 5),
            Command(9, "two \\\n    --flag", ("third",), 11),
            Command(12, "three", (), 13),
        ),
        Checking(),
    )


def test_comments_directly_before_a_block_say_how_to_check_it() -> None:
    page = "<!-- figures vary -->\n<!-- exits with 1 -->\n```console\n$ one\n```\n"
    (block,) = parse(page)
    assert isinstance(block, Console)
    assert block.checking == Checking(figures_vary=True, exit_code=1)


def test_a_comment_with_text_after_it_belongs_to_no_block() -> None:
    (block,) = parse("<!-- exits with 1 -->\n\n```console\n$ one\n```\n")
    assert isinstance(block, Console)
    assert block.checking == Checking()


def test_a_reason_not_to_run_a_block() -> None:
    with_reason, without = parse(
        "<!-- not run: needs a GPU -->\n```console\n$ one\n```\n<!-- not run -->\n```console\n$ two\n```\n"
    )
    assert isinstance(with_reason, Console)
    assert isinstance(without, Console)
    assert with_reason.checking.not_run == "needs a GPU"
    assert without.checking.not_run == ""


def test_comments_without_a_meaning_are_kept_for_the_report() -> None:
    (block,) = parse("<!-- figure vary -->\n```console\n$ one\n```\n")
    assert isinstance(block, Console)
    assert block.checking.unknown == ("figure vary",)


def test_hidden_setup() -> None:
    assert parse("<!-- setup\n$ one\n$ two \\\n  three\n-->\n") == [
        Setup(1, (Command(2, "one", (), 3), Command(3, "two \\\n  three", (), 5)))
    ]


def test_setup_directly_before_a_block_says_nothing_about_it() -> None:
    _, block = parse("<!-- setup\n$ one\n-->\n```console\n$ two\n```\n")
    assert isinstance(block, Console)
    assert block.checking == Checking()


def test_a_script_and_the_output_that_follows_it() -> None:
    page = "```python\nprint(1)\n```\n\n```text\n1\n```\n\n```python\nprint(2)\n```\nprose\n```text\n3\n```\n"
    first, second, unrelated = parse(page)
    assert first == Script(1, "print(1)\n", Checking(), ("1",), 6)
    assert second == Script(9, "print(2)\n", Checking())
    assert isinstance(unrelated, Other)


def test_a_block_with_a_title_is_a_file() -> None:
    assert parse('```toml title="recipe.toml"\na = 1\n\nb = 2\n```\n') == [File(1, "recipe.toml", "a = 1\n\nb = 2\n")]


def test_longer_fences_hold_shorter_ones() -> None:
    (block,) = parse("````markdown\n```console\n$ one\n```\n````\n")
    assert block == Other(1, "markdown", ("```console", "$ one", "```"))


def test_blocks_of_list_items_and_indented_blocks_are_no_examples() -> None:
    in_list, indented = parse("1. First\n\n   ```console\n   $ one\n   ```\n\nText\n\n    $ two\n")
    assert in_list == Other(3, "console", ("$ one",))
    assert indented == Other(9, None, ("$ two",))
