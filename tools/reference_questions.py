"""Writes questions and answers about Python's language reference, which is part of every Python (`pydoc_data.topics`).

Usage: python -m tools.reference_questions FOLDER

Writes conversations to train.jsonl and held_out.jsonl. Each conversation is about one topic, and its answers are
paragraphs of the reference. No topic is in both files.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from pydoc_data.topics import topics

N_TURNS = 3
LONGEST = 700
EVERY = 8
"""Every EVERY-th topic is held out."""


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    told = [conversation for name in sorted(topics) if (conversation := conversation_about(topics[name])) is not None]
    for name, chosen in (
        ("train.jsonl", [row for number, row in enumerate(told) if number % EVERY]),
        ("held_out.jsonl", told[::EVERY]),
    ):
        lines = [json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in chosen]
        (folder / name).write_text("".join(lines), encoding="utf-8")
        print(f"{folder / name}: {len(chosen)} conversations")


def conversation_about(text: str) -> list[dict[str, str]] | None:
    """Return a conversation that asks about a topic's title and answers with its first paragraphs of prose."""
    title = text.strip().splitlines()[0].strip()
    answers = [" ".join(part.split()) for part in text.split("\n\n") if is_prose(part)][:N_TURNS]
    if not answers:
        return None
    questions = [f"What does the Python language reference say about: {title}?"] + ["Go on."] * (len(answers) - 1)
    turns = zip(questions, answers, strict=True)
    return [
        message
        for question, answer in turns
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]


def is_prose(paragraph: str) -> bool:
    """Return whether a paragraph is prose, rather than a heading, grammar, code or a list."""
    return re.match(r"[A-Z]", paragraph) is not None and 120 <= len(paragraph) <= LONGEST and "::=" not in paragraph


if __name__ == "__main__":
    main()
