"""Everything that writes a folder: the disk, staging, and rewriting an artifact."""
