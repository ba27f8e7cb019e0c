"""One engine step: schedule -> draft -> verify -> commit."""
