"""The stand-in as a process, which prints its endpoint: `python -m tests.hub_stand_in owner/model=FOLDER …`."""

from __future__ import annotations

import argparse
import json
import threading
from pathlib import Path

from tests.hub_stand_in import Hub, running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", help="owner/model=FOLDER")
    parser.add_argument("--fault", action="append", default=[], help='JSON: {"kind": "status", "every": 5, ...}')
    parser.add_argument("--token", action="append", default=[], help="a token that is known; writing needs one then")
    parser.add_argument("--cdn", action="store_true", help="send readers of large files to a second host")
    parser.add_argument("--page-size", type=int, default=1000)
    parser.add_argument("--part-nbytes", type=int)
    parser.add_argument("--bytes-per-second", type=float)
    options = parser.parse_args()
    hub = Hub(
        tokens=dict.fromkeys(options.token, "user"),
        page_size=options.page_size,
        part_nbytes=options.part_nbytes,
        with_cdn=options.cdn,
        bytes_per_second=options.bytes_per_second,
    )
    for text in options.folders:
        name, _, folder = text.partition("=")
        hub.add_folder(name, Path(folder))
    for text in options.fault:
        hub.faults.add(**json.loads(text))
    with running(hub):
        print(hub.endpoint, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
