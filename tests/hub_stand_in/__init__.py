"""A stand-in of the Hugging Face Hub on loopback for tests, written with the standard library.

In a test:

    with running(Hub()) as hub:
        hub.add_folder("owner/model", folder)
        hub.faults.add("status", route="GET .*/resolve/", every=5)
        point_here(monkeypatch, hub, tmp_path)  # or subprocess.run(..., env=environment(hub, tmp_path))
        ...
        assert not [request for request in hub.log if request.server == "cdn" and "authorization" in request.headers]

As a separate process, which prints its endpoint and serves until it is killed:

    python -m tests.hub_stand_in owner/model=FOLDER --fault '{"kind": "status", "every": 5}'

Files of directories stay on disk and are read in pieces, so that large repositories need little memory.
"""

from tests.hub_stand_in.client import environment, point_here
from tests.hub_stand_in.faults import Fault, Faults
from tests.hub_stand_in.repositories import Repositories, Repository, StoredFile
from tests.hub_stand_in.server import Hub, Request, running

__all__ = [
    "Fault",
    "Faults",
    "Hub",
    "Repositories",
    "Repository",
    "Request",
    "StoredFile",
    "environment",
    "point_here",
    "running",
]
