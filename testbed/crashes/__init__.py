"""Agents that die, fail or wait at a fault point, and what tests and proofs do with them."""
