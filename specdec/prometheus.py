"""The place of `specdec.metrics.prometheus` before version 0.2; it will go with version 0.3."""

from specdec.metrics.prometheus import CONTENT_TYPE, render

__all__ = ["CONTENT_TYPE", "render"]
