// SPDX-License-Identifier: GPL-2.0
/*
 * Hook of a pod's cgroup: which RDMA character devices its processes may open. The kernel asks the
 * programs of the cgroup and of all above it, and every one must say yes: this one only takes away
 * from what the runtime grants.
 */
#include <uapi/linux/bpf.h>

/*
 * Majors of uverbs, umad and issm nodes, which are dynamic but for one: the agent reads them from
 * /proc/devices. All pods' programs share this map, so that a module that comes later is guarded
 * for all at once.
 */
BPF_F_TABLE("hash", __u32, __u32, rdma_majors, 64, 0);

struct device_number {
	__u32 major;
	__u32 minor;
};

/* Each loaded program has one of its own, filled before it is attached: the pod's own nodes. */
BPF_F_TABLE("hash", struct device_number, __u32, pod_devices, 64, 0);

#define REFUSED 0
#define ALLOWED 1

/*
 * Making a node is left to the runtime's program: a privileged container gets all of the host's,
 * and none can be opened but the pod's own.
 */
int device(struct bpf_cgroup_dev_ctx *ctx)
{
	struct device_number number = {.major = ctx->major, .minor = ctx->minor};
	__u32 type = ctx->access_type & 0xffff, access = ctx->access_type >> 16;

	if (type != BPF_DEVCG_DEV_CHAR || !(access & (BPF_DEVCG_ACC_READ | BPF_DEVCG_ACC_WRITE)))
		return ALLOWED;
	if (!rdma_majors.lookup(&number.major))
		return ALLOWED;
	return pod_devices.lookup(&number) ? ALLOWED : REFUSED;
}
