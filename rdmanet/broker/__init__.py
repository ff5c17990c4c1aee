"""The agent's side of leases: pairs the two ends, writes the guard, never touches the data.

``core`` decides (no I/O, no clock), ``server`` does what it decided, ``values`` are the words both use.
"""
