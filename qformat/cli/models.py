"""What commands that run models share: torch and transformers, imported with a clear word if they are missing."""

from __future__ import annotations

import logging
import warnings

from qformat.errors import UsageError


def quiet_transformers() -> None:
    """Import transformers and silence its progress bars and advice. Raises UsageError if it is not installed."""
    try:
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise UsageError(f"this needs torch and transformers: pip install 'qformat[models]' ({error})") from error
    # transformers imports bitsandbytes where it is installed, which then advises packages that nobody asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # Of transformers about its own code.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
