"""The command line: one file a command, a table of them in `main`, the only place that prints."""
