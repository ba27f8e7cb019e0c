"""Speed: decoding with and without speculation, the machine's limit, and other engines beside it."""
