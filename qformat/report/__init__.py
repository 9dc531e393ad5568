"""Self-contained HTML reports: each is one file that opens offline and shows what a command's `--json` output holds."""
