"""The demonstration: two RDMA pods and one without, end to end (``python -m testbed.demo``)."""
