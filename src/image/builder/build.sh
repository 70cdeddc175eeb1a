#!/bin/sh
# What the host has done in a builder microVM: `mvm-build prepare PROCESSES`, `mvm-build run COMMAND...`, `mvm-build collect OUT`.
# Codes besides the command's own: 120 more processes than it may have, 121 more memory, 122 more disk; 123 the result is no
# directory, 124 it does not fit on its drive.
set -e
group=/sys/fs/cgroup/build

case $1 in
prepare)
    # In the order in which the host hands them over.
    mkdir -p /run/job
    mount -t ext4 -o ro,nosuid,nodev,noload /dev/vdc /run/job
    mount -t ext4 -o nosuid,nodev /dev/vdd /nix
    mkdir -p /nix/store /nix/var/nix /nix/home
    mkdir -m 1777 /nix/tmp
    chgrp nixbld /nix/store
    chmod 1775 /nix/store
    mount --bind /nix/tmp /tmp
    mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup
    echo '+pids +memory' >/sys/fs/cgroup/cgroup.subtree_control
    # However much it computes, the agent is heard.
    echo '+cpu' >/sys/fs/cgroup/cgroup.subtree_control 2>/dev/null || true
    mkdir "$group"
    echo "$2" >"$group/pids.max"
    # Enough is left for the agent to tell what became of the rest.
    awk '$1 == "MemTotal:" { printf "%dK\n", $2 - 49152 }' /proc/meminfo >"$group/memory.max"
    ;;
run)
    shift
    (
        echo 0 >"$group/cgroup.procs"
        exec "$@"
    ) &
    child=$!
    verdict() {
        grep -q '^max 0$' "$group/pids.events" || return 120
        grep -q '^oom_kill 0$' "$group/memory.events" || return 121
        [ "$(df -Pk /nix | awk 'END { print $4 }')" -gt 64 ] || return 122
    }
    while kill -0 "$child" 2>/dev/null; do
        verdict || break
        sleep 0.2
    done
    code=0
    verdict || code=$?
    if [ "$code" != 0 ]; then
        # What is written to a full disk may still end well.
        if [ "$code" != 122 ] || ! wait "$child"; then
            echo 1 >"$group/cgroup.kill"
            exit "$code"
        fi
        exit 0
    fi
    wait "$child"
    ;;
collect)
    if ! [ -d "$2" ]; then
        exit 123
    fi
    cd "$2"
    set --
    for file in vmlinux initrd rootfs vmm.json; do
        if [ -f "$file" ]; then
            set -- "$@" "$file"
        fi
    done
    if [ $# != 0 ]; then
        # Links are followed here, where what they lead to is.
        tar -chf /dev/vde "$@" && sync || exit 124
    fi
    ;;
*)
    exit 2
    ;;
esac
