#!/busybox sh
# The guest's first process: modules, then the host's root read-only over 9p under a writable tmpfs layer.
# Everything here is busybox; the host's programs are first used by the command itself.
/busybox mkdir -p /proc /sys /dev /lower /layer /newroot
export PATH=/bin
/busybox mkdir -p /bin && /busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
. /settings
while read -r module parameters; do
	# shellcheck disable=SC2086 # parameters are words
	insmod "/modules/$module" $parameters || echo "vm: cannot load $module" >/dev/console
done </modules/order
if [ "$ACTION" = probe ]; then
	for port in /sys/class/virtio-ports/*; do
		[ "$(cat "$port/name")" = status ] && echo "exit 0" >"/dev/${port##*/}"
	done
	poweroff -f
fi
mount -t 9p -o "trans=virtio,version=9p2000.L,msize=$MSIZE,cache=loose,ro" root /lower || exec poweroff -f
mount -t tmpfs -o mode=755,size=75% tmpfs /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work overlay /newroot || exec poweroff -f
for directory in proc sys dev run; do mkdir -p "/newroot/$directory"; done
mount -t tmpfs -o mode=755 tmpfs /newroot/run
mkdir -p /newroot/run/vm /newroot/run/lock
cp /busybox /main /command /settings /newroot/run/vm/
mkdir -p "/newroot$BUILD"
mount -t 9p -o "trans=virtio,version=9p2000.L,msize=$MSIZE,cache=none" build "/newroot$BUILD" || exec poweroff -f
mkdir -p "/newroot/lib/modules/$RELEASE"
mount --bind "/lower$MODULES" "/newroot/lib/modules/$RELEASE"
# Disks come in the order of the command line; eval keeps quoted paths whole.
eval "set -- $TREES"
for letter in a b c d; do
	[ $# -gt 0 ] || break
	mkdir -p "/tree-$letter"
	mount -t ext4 -o ro,noload,noatime "/dev/vd$letter" "/tree-$letter" && mount --bind "/tree-$letter" "/newroot$1"
	shift
done
mount --move /proc /newroot/proc
mount --move /sys /newroot/sys
mount --move /dev /newroot/dev
exec switch_root /newroot /run/vm/busybox sh /run/vm/main
