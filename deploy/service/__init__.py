"""Searching and changing an index over HTTP."""
