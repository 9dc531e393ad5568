"""Commands that exchange artifacts with the Hub."""
