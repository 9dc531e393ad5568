"""Commands that check and compare artifacts."""
