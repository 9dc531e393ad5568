"""AdamW with paged states: the layout of pages, their movement between host and device, and the updates."""
