"""What takes the place of a file that was not fetched."""

from __future__ import annotations

from tests.hub_stand_in.repositories import StoredFile

POINTER = StoredFile(bytes(223_344), lfs=True).pointer
"""What git checks out in place of a large file if git-lfs is not installed; the stand-in of the Hub serves it, too."""

STAND_INS: dict[str, tuple[bytes, str, str]] = {
    "LFS": (POINTER, "Git LFS pointer, not the file itself, which has 223,344 bytes", "git lfs pull"),
    "LFS without a size": (POINTER.partition(b"size")[0], "Git LFS pointer", "git lfs pull"),
    "LFS before 2014": (POINTER.replace(b"git-lfs.", b"hawser."), "Git LFS pointer", "git lfs pull"),
    "git-annex": (b"/annex/objects/SHA256E-s223344--" + b"ab" * 32 + b".json\n", "git-annex pointer", "git annex get"),
    "HTML": (b"<!DOCTYPE html>\n<html><head>" + b"x" * 5000, "web page", "/resolve/, not /blob/"),
    "HTML in another case, after a mark": (b"\xef\xbb\xbf\r\n <!doctype HTML>", "web page", "hf download"),
    "HTML without a doctype": (b'<html lang="en">', "web page", "hf download"),
    "an error of S3": (b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied', "web page", "hf download"),
    "an answer of the Hub": (b"Entry not found", "answer of the Hub ('Entry not found')", "hf download"),
    "a gated repository": (b"Access to model x/y is restricted.\nMore", "Access to model x/y is restricted.", "log in"),
}
"""Bytes, a part of what is said about them, and a part of the next step, by kind."""
