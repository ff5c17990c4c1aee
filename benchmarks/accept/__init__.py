"""The slow proofs: what an issue asked for, shown at full size, a row per name (`make accept ONLY=rdma`)."""
