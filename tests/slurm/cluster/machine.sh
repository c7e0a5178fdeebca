#!/bin/bash
# First process (pid 1) of one simulated machine; cluster.py starts it inside fresh namespaces.
#   machine.sh NAME STATE_FOLDER OUTER_PID_FILE
# It gives the machine its name, its own /proc, /sys, local disk (/mnt) and shared memory, then reaps orphans
# until it is killed.
set -eu
name=$1
state=$2
pid_file=$3
# /proc is still the outer one here, so this is the pid that the host sees.
read -r outer_pid _ < /proc/self/stat
hostname "$name"
# The mount namespace is private: the host's own file stays as it is.
mount --bind "$state/etc/hosts" /etc/hosts
mount -t sysfs sysfs /sys
mkdir -p "$state/local/$name"
mount --bind "$state/local/$name" /mnt
mount -t tmpfs -o mode=1777,size=2g tmpfs /dev/shm
mount -t proc proc /proc
ip link set lo up
echo "$outer_pid" > "$pid_file.new"
mv "$pid_file.new" "$pid_file"
while :; do
  sleep 100000 &
  wait $! || true
done
