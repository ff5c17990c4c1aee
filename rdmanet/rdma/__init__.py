"""RDMA devices for pods: back ends behind one small interface (``DeviceBackend``)."""
