"""rtnetlink, RDMA netlink and network namespaces, over pyroute2's message classes.

Everything here is synchronous and meant for worker threads: a netlink round trip costs 0.3 ms, entering a
namespace needs a thread of its own. Nothing here keeps a descriptor inside a pod's namespace open: that would keep a
dead pod alive.
"""
