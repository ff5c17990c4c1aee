"""rtnetlink, RDMA netlink and network namespaces.

``messages`` and ``batch`` are for what every ADD and DEL does: packed by hand, many in one send. ``route`` and
``nldev`` are for everything else, over pyroute2's message classes: 0.3 to 0.5 ms for each.

Everything here is synchronous and meant for worker threads; entering a namespace needs a thread of its own. Nothing
here keeps a descriptor inside a pod's namespace open: that would keep a dead pod alive.
"""
