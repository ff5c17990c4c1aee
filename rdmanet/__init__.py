"""rdmanet: the network of a host that runs containers, kernel path and RDMA path under one identity."""

__version__ = "0.1.0"
