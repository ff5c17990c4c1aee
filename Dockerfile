# The agent and the command line; `make image` builds it. The first stage compiles the datapath and the CNI executable; the image
# itself has neither a compiler nor LLVM nor kernel headers: `rdmanet datapath build` is not in it, the artifact is.
#
# Run it in the host's network and pid namespaces, privileged, with /run/rdmanet, /var/lib/rdmanet, /sys/fs/bpf and
# the runtime's namespaces (/run/netns, shared propagation) mounted; docs/testing.md has the whole command.
FROM debian:trixie-slim AS build
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        gcc libc6-dev linux-headers-amd64 make musl-tools python3-bpfcc python3-venv \
    && rm -rf /var/lib/apt/lists/*
# bcc wants the two halves of the headers as one tree; the flavour's generated files win.
RUN mkdir /headers && cp -a /usr/src/linux-headers-*-common/. /headers/ && cp -a /usr/src/linux-headers-*-amd64/. /headers/
WORKDIR /src
COPY pyproject.toml README.md ./
COPY rdmanet rdmanet
COPY bpf bpf
COPY cni cni
RUN make -C cni OUT=/out/opt/cni/bin
RUN python3 -m venv /opt/rdmanet && /opt/rdmanet/bin/pip install --no-cache-dir --no-compile '.[agent]' \
    && /opt/rdmanet/bin/pip uninstall -y -q pip
# bcc makes the maps while it compiles: this step wants CAP_SYS_ADMIN in the build (make image gives it).
RUN BCC_KERNEL_SOURCE=/headers python3 -m rdmanet.datapath.compiler --output /out/usr/lib/rdmanet/artifact

FROM debian:trixie-slim
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/* /usr/share/doc /usr/share/man
COPY --from=build /out/ /
COPY --from=build /opt/rdmanet /opt/rdmanet
ENV PATH=/opt/rdmanet/bin:$PATH PYTHONUNBUFFERED=1
ENTRYPOINT ["rdmanet"]
CMD ["agent"]
