"""Repositories of the Hub as a source."""
