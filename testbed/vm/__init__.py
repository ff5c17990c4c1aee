"""A throwaway virtual machine on the test kernel, with this machine's root file system below a writable layer.

``python -m testbed.vm run -- COMMAND…`` from a shell, ``vm.run(argv)`` from Python; docs/testing.md tells more.
"""

from testbed.vm.runner import GuestFailure, Settings, run

__all__ = ["GuestFailure", "Settings", "run"]
