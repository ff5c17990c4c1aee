"""ML jobs: devices by kubelet's device plugin and CDI, an image, manifests, and jobs on a host without Kubernetes."""

from __future__ import annotations

import importlib
import importlib.util

from benchmarks.accept.proof import Claim, Place, Proof, Work
from testbed.rows import Figure, need


def _of(module: str) -> Work:
    """A row's work; its module is imported when the row is carried out."""

    def work() -> Figure:
        name = f"{__name__}.{module}"
        need(importlib.util.find_spec(name) is not None, f"nothing proves it yet: {module}.py is not written")
        figure: Figure = importlib.import_module(name).measure()
        return figure

    return work


_HERE = (Place.HOST,)

#: In the order of the issue. A row with a real device is carried out where pods can have one.
ROWS: Proof = {
    "plugin": Claim(_of("plugin")),
    "kubelet-restart": Claim(_of("kubelet_restart")),
    "health": Claim(_of("health")),
    "numa": Claim(_of("numa"), _HERE),
    "slot": Claim(_of("slot")),
    "image": Claim(_of("image"), _HERE),
    "debian13": Claim(_of("debian13"), _HERE),
    "manifests": Claim(_of("manifests"), _HERE),
    "run": Claim(_of("run")),
    "run-crash": Claim(_of("run_crash")),
    "job": Claim(_of("job")),
}
