"""Data-parallel training over leased queue pairs: what a job on rdmanet looks like. README.md is the way in."""
