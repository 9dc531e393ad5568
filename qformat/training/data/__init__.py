"""From files of text or conversations to the tokens that are trained on: read, rendered, tokenised once, packed."""
