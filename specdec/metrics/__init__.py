"""What an engine did: counts and times, and how Prometheus reads them."""
