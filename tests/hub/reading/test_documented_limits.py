"""docs/hub.md states the limits that apply."""

from __future__ import annotations

from qformat.hub.publishing.upload import ANSWER_TIMEOUT_S
from qformat.hub.reading.transfer import DEFAULT_PATIENCE, DEFAULT_TRANSFER
from tests.repository import ROOT


def test_the_table_of_limits_is_that_of_the_defaults() -> None:
    text = (ROOT / "docs" / "hub.md").read_text().partition("## What a server can cost")[2].partition("\n## ")[0]
    limits, mib, kib = DEFAULT_PATIENCE, 2**20, 2**10
    window = f"{limits.window_s:.0f} s for every {limits.progress_nbytes // kib} KiB"
    speed = DEFAULT_TRANSFER.connections * limits.progress_nbytes / limits.window_s / 1000
    for row in (
        f"| {limits.attempts}, for answers that arrive too slowly {limits.slow_attempts} |",
        f"{ANSWER_TIMEOUT_S:.0f} s for uploads",
        f"| status and headers of an answer | {limits.window_s:.0f} s |",
        f"| {window}, so that {DEFAULT_TRANSFER.connections} connections need {speed:.0f} kB/s in all |",
        f"| {limits.task_s / 60:.0f} min, and {window} of a file |",
        f"| pause that a server may ask for | {limits.longest_asked_wait_s:.0f} s |",
        f"| {limits.answer_nbytes // mib} MiB; {limits.error_nbytes // kib} KiB and {limits.error_s:.0f} s |",
        f"| {limits.listing_pages:,} pages, {limits.listing_entries:,} files and directories, "
        f"{limits.listing_nbytes // mib} MiB |",
        f"| redirects | {limits.redirects} |",
        f"| {DEFAULT_TRANSFER.max_skipped_nbytes // mib} MiB, twice as many for all attempts of a request |",
    ):
        assert row in text
