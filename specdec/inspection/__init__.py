"""`specdec inspect`: what a checkpoint is, what it needs, and where it fits."""
