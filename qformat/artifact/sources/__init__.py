"""Opening of files that belong to no artifact, such as those of a source."""
