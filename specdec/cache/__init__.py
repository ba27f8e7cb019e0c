"""The paged KV cache: its pages, who holds them, and which of them others may take over."""
