"""Bytes on disk: layout, headers, manifest, digests, staging, reading and verifying (spec sections 2, 3, 7, 8)."""
