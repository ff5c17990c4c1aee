# One image for agent, device plugin, installer and command line; `make image` builds it, testbed/built_image.py on a
# base that is made on the spot. The first stage compiles datapath and CNI executable. The image itself has neither
# compiler nor LLVM, bcc or kernel headers: it has the artifact, and no `rdmanet datapath build`.
#
# The agent runs as root, in the host's network and pid namespaces, privileged, with /run/rdmanet, /var/lib/rdmanet,
# /sys/fs/bpf and the runtime's namespaces (/run/netns, shared propagation) mounted; docs/testing.md has the whole command.
# Root it must be: programs, links and pods' namespaces want CAP_NET_ADMIN and CAP_SYS_ADMIN (docs/operations.md). The
# device plugin needs no capability and no file system to write on: it is uid 0 because kubelet's directory and the
# agent's socket are.
ARG BASE=debian:trixie-slim

FROM ${BASE} AS build
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        gcc libc6-dev make musl-tools python3-bpfcc python3-venv
# Headers without the kernel that their packages depend on. bcc wants the two halves as one tree; the flavour's files win.
WORKDIR /headers
RUN headers=$(apt-cache depends linux-headers-amd64 | sed -n 's/.*Depends: \(linux-headers-[0-9].*\)-amd64$/\1/p') \
    && apt-get download "$headers-common" "$headers-amd64" \
    && for package in *.deb; do dpkg-deb -x "$package" /unpacked; done \
    && cp -a "/unpacked/usr/src/$headers-common/." . && cp -a "/unpacked/usr/src/$headers-amd64/." . \
    && rm -r /unpacked ./*.deb
WORKDIR /src
COPY pyproject.toml README.md ./
COPY rdmanet rdmanet
COPY bpf bpf
COPY cni cni
RUN make -C cni OUT=/out/usr/lib/rdmanet/cni
# Whoever has an index or certificates of their own gives pip's settings, and with `cert = /etc/pip.pem` certificates:
# --secret id=pip.conf,src=FILE --secret id=pip.pem,src=FILE. What pip installs must not lean on this stage's packages;
# only the image's pyverbs is the distribution's. Bytecode is made here, as the image may be mounted read-only.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=pip.pem,target=/etc/pip.pem \
    python3 -m venv /opt/rdmanet \
    && /opt/rdmanet/bin/pip install --no-cache-dir '.[agent,kubernetes]' \
    && /opt/rdmanet/bin/pip uninstall -y -q pip \
    && sed -i 's/^include-system-site-packages.*/include-system-site-packages = true/' /opt/rdmanet/pyvenv.cfg
# bcc makes the maps while it compiles: this step wants CAP_SYS_ADMIN in the build (make image gives it).
RUN BCC_KERNEL_SOURCE=/headers python3 -m rdmanet.datapath.compiler --output /out/usr/lib/rdmanet/artifact

FROM ${BASE}
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ibverbs-providers python3 python3-pyverbs \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/* /usr/share/doc /usr/share/man
COPY --from=build /out/ /
COPY --from=build /opt/rdmanet /opt/rdmanet
ENV PATH=/opt/rdmanet/bin:$PATH PYTHONUNBUFFERED=1
# An agent answers only when it is ready. Of podman and Docker: kubelet has probes of its own, and another command of this
# image than the agent is started with --no-healthcheck.
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s CMD ["rdmanet", "status", "-o", "json"]
ENTRYPOINT ["rdmanet"]
CMD ["agent"]
