"""A form of a command that has run once without a fault."""

from __future__ import annotations

import itertools
from pathlib import Path

from tests.cli.faults.injection import Interceptor
from tests.cli.faults.running import Case
from tests.cli.faults.table import Form


class Rehearsed:
    """A form, the calls that it makes to the disk, and what it makes when nothing disturbs it.

    Attributes:
        before: What lies under the final name before the command runs.
        calls: Names of its calls to the disk, in order.
        whole: What lies under the final name afterwards.
        everything: All files of the folder afterwards.
    """

    def __init__(self, form: Form, given: Path, folder: Path) -> None:
        self.form = form
        self._given = given
        self._folder = folder
        self._numbers = itertools.count()
        case = self.case()
        self.before = case.made()
        disk = Interceptor()
        done = case.run(disk)
        assert done.code == 0, done.told
        self.calls = disk.names
        self.whole = case.made()
        self.everything = case.everything()
        assert self.calls
        assert self.whole not in (None, self.before)

    def case(self) -> Case:
        """Return a new folder for a run."""
        return Case(self.form, self._given, self._folder / str(next(self._numbers)))
