"""Writing output directories: disk operations, staging and rewriting artifacts."""
