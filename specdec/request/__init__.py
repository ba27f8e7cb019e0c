"""One request: its tokens, text, parameters' effects and statistics."""
