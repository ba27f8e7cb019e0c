"""Measurements and checks that only the project itself runs; not in the wheel."""
