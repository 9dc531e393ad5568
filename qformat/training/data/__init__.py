"""Prepares training data: reads rows of text or conversations, renders, tokenises, caches and packs them."""
