# The guest's second stage, in the layered root: the rest of the file systems, then the command.
b=/run/vm/busybox
. /run/vm/settings
port() {
	for port in /sys/class/virtio-ports/*; do
		[ "$($b cat "$port/name")" = "$1" ] && echo "/dev/${port##*/}"
	done
}
exec 3>"$(port status)" 4>"$(port stdout)" 5>"$(port stderr)"
$b mkdir -p /dev/pts /dev/shm /dev/mqueue
$b mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
$b mount -t tmpfs -o mode=1777 tmpfs /dev/shm
$b mount -t cgroup2 cgroup2 /sys/fs/cgroup
$b mount -t bpf bpf /sys/fs/bpf
$b mount -t debugfs debugfs /sys/kernel/debug
$b mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null
[ -e /dev/fd ] || $b ln -s /proc/self/fd /dev/fd
[ -e /dev/ptmx ] || $b ln -s pts/ptmx /dev/ptmx
for i in 0:stdin 1:stdout 2:stderr; do $b ln -sf "/proc/self/fd/${i%%:*}" "/dev/${i##*:}"; done
for controller in $($b cat /sys/fs/cgroup/cgroup.controllers); do
	echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
done
$b mkdir -p /var/lib/rdmanet && $b mount -t tmpfs -o mode=700 tmpfs /var/lib/rdmanet
$b hostname "$HOSTNAME"
$b ip link set lo up
ulimit -l unlimited
ulimit -n 65536
$b mkfifo /run/vm/stdout /run/vm/stderr
# The ports can be opened once only; pipes let the command's children reopen /dev/stdout and /dev/stderr.
$b cat </run/vm/stdout >&4 3>&- 5>&- &
stdout_pump=$!
$b cat </run/vm/stderr >&5 3>&- 4>&- &
stderr_pump=$!
echo "booted" >&3
if [ "$MERGE" = 1 ]; then
	exec 6>/run/vm/stderr # opens and closes the unused pipe, so that its pump ends
	$b setsid $b sh /run/vm/command </dev/null >/run/vm/stdout 2>&1 3>&- 4>&- 5>&- 6>&- &
else
	$b setsid $b sh /run/vm/command </dev/null >/run/vm/stdout 2>/run/vm/stderr 3>&- 4>&- 5>&- &
fi
command=$!
exec 4>&- 5>&- 6>&-
wait "$command"
status=$?
# What the command left running would keep the pipes open: end it, then let the pumps finish.
for process in /proc/[0-9]*; do
	pid=${process##*/}
	case $pid in
	1 | "$stdout_pump" | "$stderr_pump") ;;
	*) [ -n "$($b readlink "$process/exe")" ] && kill -9 "$pid" 2>/dev/null ;;
	esac
done
wait "$stdout_pump" "$stderr_pump"
echo "exit $status" >&3
exec $b poweroff -f
