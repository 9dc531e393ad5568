"""Self-contained pages about artifacts: one HTML file that opens offline, from the object that `--json` prints."""
