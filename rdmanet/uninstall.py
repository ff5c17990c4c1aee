"""Taking everything back that agents did to the host; needs no agent, and refuses while one runs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

from rdmanet import adoption, cdi, limits, node, slots
from rdmanet.config import Config
from rdmanet.datapath.kept import Kept
from rdmanet.datapath.maps import Datapath
from rdmanet.devices import find_devices
from rdmanet.devices import undo as undo_devices
from rdmanet.documents import FILE as OBJECTS
from rdmanet.errors import NotFoundError, RequestError
from rdmanet.model import Attachment
from rdmanet.netlink import namespace
from rdmanet.netlink.batch import BatchSockets
from rdmanet.rdma.backend import DeviceBackend
from rdmanet.rdma.cgroup import Cgroups
from rdmanet.rebuild import files_aside
from rdmanet.removal import MAX_TOGETHER, remove_links
from rdmanet.reserve import FILE as RESERVE
from rdmanet.store import FILE as STATE
from rdmanet.store import Store, owned

log = logging.getLogger(__name__)


def uninstall(config: Config) -> None:
    """Takes back everything that agents with this configuration did to the host. Idempotent; refused while one runs."""
    state_dir = config.agent.state_dir
    with owned(state_dir):
        # Everything goes, and first what may be needed for that.
        (state_dir / RESERVE).unlink(missing_ok=True)
        store = Store(state_dir / STATE)
        try:
            store.begin(node.boot_id())
            adoption.refuse_strangers(store.attachments(), str(store.path))
            node.refuse_lost_effects(store)
            devices, _ = find_devices(config, store)
            hierarchy, _ = limits.find_hierarchy()
            attachments = store.attachments()
            for start in range(0, len(attachments), MAX_TOGETHER):
                _remove(attachments[start : start + MAX_TOGETHER], store, devices, hierarchy, config)
            if hierarchy is not None:
                limits.undo_controller(store, hierarchy)
            slots.undo(store, config.kubernetes)
            undo_devices(store)
            node.undo(store, lambda: Datapath.remove(config.datapath.bpffs_dir))
        finally:
            store.close()
        Kept(config.datapath_dir).remove()
        _remove_files(config)
    print("uninstalled; the host is as it was")


def _remove(
    attachments: Sequence[Attachment],
    store: Store,
    devices: DeviceBackend | None,
    hierarchy: Cgroups | None,
    config: Config,
) -> None:
    for attachment in attachments:
        if attachment.slot is not None:
            cdi.remove(config.kubernetes.cdi_dir, attachment.slot)
        if hierarchy is not None:
            limits.release(hierarchy, attachment)
        if devices is not None and attachment.wants_rdma:
            with contextlib.ExitStack() as stack:
                descriptor = None
                # Nothing is there, or the plain file that was below the mount.
                with contextlib.suppress(NotFoundError, RequestError):
                    descriptor = stack.enter_context(namespace.opened(attachment.netns))
                devices.remove(attachment, descriptor)
    with contextlib.closing(BatchSockets()) as host:
        failures = remove_links(host, [attachment.host_ifname for attachment in attachments])
    for attachment in attachments:
        if attachment.host_ifname in failures:
            raise failures[attachment.host_ifname]
        store.forget(attachment.id)
        print(f"removed {attachment.host_ifname} of {attachment.pod}")


def _remove_files(config: Config) -> None:
    """Removes what agents wrote, by name: the directories are the configuration's and may hold other people's files."""
    state_dir = config.agent.state_dir
    databases = [f"{name}{suffix}" for name in (STATE, OBJECTS) for suffix in ("", "-wal", "-shm")]
    files = [config.agent.socket, *(state_dir / name for name in databases), *files_aside(state_dir)]
    files.append(state_dir / f"{RESERVE}.part")
    if (state_dir / "pending").is_dir():
        files += (state_dir / "pending").iterdir()
    for path in (*files, state_dir / "agent.lock"):
        path.unlink(missing_ok=True)
    for directory in (state_dir / "pending", state_dir, config.agent.socket.parent):
        try:
            directory.rmdir()
        except FileNotFoundError:
            continue
        except OSError as error:
            log.info("%s stays: %s", directory, error)
