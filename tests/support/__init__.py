"""What tests share: small checkpoints, doubles, oracles, simulations."""
