"""Text in and text out: chat templates and generation."""
