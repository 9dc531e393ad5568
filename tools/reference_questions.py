"""Questions and answers from Python's own language reference, which every Python brings along (`pydoc_data.topics`).

Usage: python -m tools.reference_questions FOLDER

Writes train.jsonl and held_out.jsonl: conversations about one topic each, whose answers are paragraphs of the
reference. No topic is in both.
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
"""One topic in so many is held out."""


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
    """Return a topic as a conversation: its title is asked about, its first paragraphs of prose are the answers."""
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
    """Tell sentences from headings, grammar, code and lists."""
    return re.match(r"[A-Z]", paragraph) is not None and 120 <= len(paragraph) <= LONGEST and "::=" not in paragraph


if __name__ == "__main__":
    main()
