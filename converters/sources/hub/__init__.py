"""Hub repositories as a source."""
