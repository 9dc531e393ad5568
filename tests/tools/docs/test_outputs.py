"""Outputs agree if they differ only in what depends on the machine, or in what the page leaves out."""

from __future__ import annotations

import pytest

from tools.docs.examples.outputs import difference, masked


def agree(expected: str, actual: str, *, versions: bool = False, figures: bool = False) -> bool:
    return difference(expected.split("\n"), actual.split("\n"), versions=versions, figures=figures) is None


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("done in 1.2 s", "done in 12.34 s"),
        ("done in 3 ms", "done in 0.1 s"),
        ("step 5  0:04 left", "step 5  1:02:03 left"),
        ("281 MB/s", "1.15 GB/s"),
        ("35.4 tokens/s", "1,204 tokens/s"),
        ("(109 M weights/s)", "(60 M weights/s)"),
        ("peak memory 306 MB", "peak memory 1.5 GB"),
        ("needs 121 MB; 73.2 GB free", "needs 121 MB; 900 MB free"),
        ("at 0123456789abcdef0123456789abcdef01234567", "at 76543210fedcba9876543210fedcba9876543210"),
        ("commit 0123456", "commit 89abcdef"),
        ("43.0%, 1.0 s, ... MB/s", "43.0%, 1.0 s, 120 MB/s"),
    ],
)
def test_figures_of_the_machine_may_differ(shown: str, printed: str) -> None:
    assert agree(shown, printed)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("210 tensors", "211 tensors"),
        ("269 MB -> 116 MB (43.0%)", "269 MB -> 117 MB (43.0%)"),
        ("4.147 bits a packed weight, 1.0 s", "4.148 bits a packed weight, 1.0 s"),
        ("3 shards", "4 shards"),
        ("38fc3fe2c50ebb2194f788e72b9a6b22", "48fc3fe2c50ebb2194f788e72b9a6b22"),
        ("a  b", "a b"),
        ("qformat 0.1.0", "qformat 0.2.0"),
    ],
)
def test_every_other_text_must_be_equal(shown: str, printed: str) -> None:
    assert not agree(shown, printed)


def test_a_figure_of_another_length_may_move_the_columns_of_its_table() -> None:
    assert agree("name      time  file\none      1.0 s  a", "name       time  file\none     123.0 s  a")


def test_versions_may_differ_where_the_command_shows_them() -> None:
    assert agree("torch 2.13.0+cpu, numpy 2.4.6", "torch 2.14.1, numpy 2.5.0", versions=True)


def test_every_number_is_masked_where_figures_vary() -> None:
    assert agree("loss 2.1034  KL 1.2e-03\n-----", "loss 12.9  KL 4\n--------", figures=True)
    assert not agree("loss 2.1034", "error 2.1034", figures=True)


@pytest.mark.parametrize(
    ("shown", "printed", "agrees"),
    [
        ("first\n...\nlast", "first\nlast", True),
        ("first\n...\nlast", "first\na\nb\nlast", True),
        ("first\n...\nlast", "first\na\nlast\nb", False),
        ("...\nmiddle\n...", "a\nmiddle\nb\nmiddle\nc", True),
        ("...\nmiddle\n...", "a\nb", False),
        ("The answer is ...", "The answer is a blue sky", True),
        ("The answer is ...", "An answer is a blue sky", False),
        ("...", "", True),
        ("a [b] (c)* ...", "a [b] (c)* d", True),
    ],
)
def test_elisions_stand_for_lines_and_for_text(shown: str, printed: str, agrees: bool) -> None:
    assert agree(shown, printed) is agrees


def test_no_output_is_no_line() -> None:
    assert masked([]) == []
    assert difference([], [], versions=False, figures=False) is None
    assert difference([], ["text"], versions=False, figures=False) is not None


def test_the_diff_shows_only_lines_that_do_not_agree() -> None:
    diff = difference(["took 1 s", "210 tensors"], ["took 2 s", "211 tensors"], versions=False, figures=False)
    assert diff is not None
    assert diff.split("\n")[2:] == ["@@ -1,2 +1,2 @@", " took 1 s", "-210 tensors", "+211 tensors"]
