"""Conversations: parses their messages, renders them with a chat template and locates what the assistant wrote."""
