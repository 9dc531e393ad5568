"""Files of an artifact: layout, headers, manifest, digests, reading and writing (spec sections 2, 3, 7 and 8)."""
