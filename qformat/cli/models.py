"""Imports torch and transformers for the commands that run models, with a clear error if they are missing."""

from __future__ import annotations

import warnings

from qformat.errors import UsageError, install_extra


def quiet_transformers() -> None:
    """Import transformers, and silence its progress bars and advice.

    Raises:
        UsageError: transformers or torch is not installed.
    """
    try:
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise UsageError(f"this command needs torch and transformers ({error}). {install_extra('models')}") from error
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # transformers warns about its own code.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
