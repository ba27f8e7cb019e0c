"""Draft length "auto": how many tokens to draft, by measured cost and by acceptance so far."""
