"""AdamW whose states live in pages: layouts, pages and their device, updates."""
