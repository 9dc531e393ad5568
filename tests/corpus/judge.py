"""Judges what a command did with a damaged copy.

same      it gave the result of the undamaged copy
changed   it gave another result, which is right: no digest covers the damage, or every digest was made anew
refused   it ended with an error that names the damaged file
other     what may not happen: one of the verdicts of `Wrong`
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from tests.corpus.damage.edits import Damage, Where
from tests.corpus.damage.table import Copy, DamageClass

MAX_MESSAGE = 4000
"""Largest number of characters that a refusal may print."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u202a-\u202e]")


class Wrong(StrEnum):
    """What may not happen."""

    SILENT = "silent: raw damage was not refused"
    ACCEPTED = "accepted: files that contradict each other were not refused"
    UNCLEAR = "unclear: the error does not name the damaged file"
    LONG = "long: the error is longer than a page"
    CONTROL = "control: the error has control characters of a terminal"
    TRACEBACK = "traceback: an exception that is not an error of qformat"
    CRASH = "crash: the process ended with a signal"
    HANG = "hang: the process used up its limit of CPU time"
    HEAVY = "heavy: the process used more than 300 MB beyond that for the undamaged copy"
    NEEDLESS = "needless: a file that may change was refused"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did.

    Attributes:
        command: Name of the command.
        end: "completed", "refused", "traceback", "crash", "hang" or "heavy".
        text: What it printed, or the end of the traceback.
        result: Its result, None if results cannot be compared.
    """

    command: str
    end: str
    text: str = ""
    result: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Judgement of one outcome: "same", "changed", "refused", or why it is wrong."""

    copy: Copy
    damage: str
    outcome: Outcome
    verdict: str

    @property
    def wrong(self) -> bool:
        return self.verdict in {*Wrong}

    def __str__(self) -> str:
        text = self.outcome.text.strip()[-600:]
        return (
            f"{self.copy} ({self.damage}), {self.outcome.command}: {self.verdict}\n    {text}\n"
            f"    again: python -m tests.corpus {self.copy}"
        )


def judge(
    copy: Copy, kind: DamageClass, damage: Damage, outcome: Outcome, *, compares_weights: bool, undamaged: str | None
) -> Verdict:
    """Judge one outcome.

    Args:
        copy: The copy.
        kind: Its class.
        damage: The damage that the copy has.
        outcome: What the command did.
        compares_weights: The command compares the bytes of weights with their digests.
        undamaged: Result of the command on the undamaged copy.
    """
    raw = kind.digests and not copy.resealed
    match outcome.end:
        case "refused":
            verdict = _refused(kind, damage, outcome.text, raw=raw)
        case "completed" if raw and _compared(damage, compares_weights=compares_weights, command=outcome.command):
            verdict = Wrong.SILENT
        case "completed" if damage.must_refuse and not raw:
            verdict = Wrong.ACCEPTED
        case "completed":
            verdict = "same" if outcome.result == undamaged else "changed"
        case _:
            verdict = Wrong[outcome.end.upper()]
    return Verdict(copy, damage.what, outcome, verdict)


def _compared(damage: Damage, *, compares_weights: bool, command: str) -> bool:
    match damage.where:
        case Where.SMALL:
            return True
        case Where.WEIGHTS:
            return compares_weights
        case Where.UNLISTED:
            return command == "verify"
        case Where.ACCOMPANYING:
            return False


def _refused(kind: DamageClass, damage: Damage, text: str, *, raw: bool) -> str:
    if damage.where is Where.ACCOMPANYING:
        return Wrong.NEEDLESS
    # A value that is valid by itself may only show in a result, such as logits that are not finite.
    by_result = (kind.original,) if damage.where is Where.WEIGHTS and not raw else ()
    if not any(name in text for name in (*damage.files, *by_result)):
        return Wrong.UNCLEAR
    if _CONTROL.search(text):
        return Wrong.CONTROL
    return Wrong.LONG if len(text) > MAX_MESSAGE else "refused"
