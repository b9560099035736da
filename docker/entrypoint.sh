#!/usr/bin/env bash
# The image's entrypoint. What a container does is said by its arguments:
#
#   docker run IMAGE                            print the help
#   docker run IMAGE train --config FILE        a command of dtr-scale
#   docker run IMAGE deepspeed FILE             any other program, as it is
#   docker run IMAGE sshd                       a node that waits for another node's launcher
#   docker run IMAGE sshd deepspeed FILE        the node that launches: the same, and the program
#   docker exec CONTAINER entrypoint.sh health  fail if what trains here has stood for 5 minutes
set -euo pipefail

ssh_dir=/shared/ssh
sshd_pid=/tmp/sshd.pid

# Make one key for the servers of all nodes and one for their users. Nodes start at the same time: the
# first to rename its folder has made them, since nothing is renamed to a folder that holds files.
make_keys() {
    [ ! -d "$ssh_dir" ] || return 0
    local made
    made=$(mktemp --directory /shared/.ssh.XXXXXX)
    ssh-keygen -q -t ed25519 -N '' -C dtr-host -f "$made/host"
    ssh-keygen -q -t ed25519 -N '' -C dtr -f "$made/id"
    echo "* $(cat "$made/host.pub")" > "$made/known_hosts"
    mv --no-target-directory "$made" "$ssh_dir" 2> /dev/null || rm -r "$made"
}

# Run the ssh server as this user, who alone may log in, until it ends. Its sessions have this
# container's environment: the launcher's own does not know a node's PATH, caches and credentials.
serve() {
    make_keys
    mkdir -p "$HOME/.ssh"
    # One variable a line: those of several lines cannot be told.
    (umask 077; env --null | sed --null-data '/\n/d' | tr '\0' '\n' > "$HOME/.ssh/environment")
    exec /usr/sbin/sshd -D -e -f /dev/null -p 2222 \
        -o "HostKey=$ssh_dir/host" -o "AuthorizedKeysFile=$ssh_dir/id.pub" -o "PidFile=$sshd_pid" \
        -o UsePAM=no -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no \
        -o PermitUserEnvironment=yes -o StrictModes=no -o LogLevel=ERROR
}

# Told to stop, `deepspeed` and sshd would end at once, and a container's end is that of its ranks. So
# the ranks of this node are told: they checkpoint, and leave with those of all nodes. The launcher
# ends with their exit code, for which it gets a second.
stop() {
    pkill --full -- --local_rank= || pkill --full deepspeed.launcher.launch || true
    while pgrep --full deepspeed.launcher.launch > /dev/null; do sleep 1; done
    sleep 1
    kill "$1" 2> /dev/null || true
}

# Run a program until it ends, by itself or because the container is told to stop.
run() {
    "$@" &
    local program=$! code=0 told=""
    trap 'told=yes; stop "$program"' TERM INT
    wait "$program" || code=$?
    # A signal ends `wait` before the program has ended.
    [ -z "$told" ] || { code=0; wait "$program" || code=$?; }
    exit "$code"
}

# No heartbeat is well: nothing trains here. A server that was started has to live.
health() {
    dtr-scale health
    [ ! -e "$sshd_pid" ] || kill -0 "$(cat "$sshd_pid")"
}

if [ "${1:-}" = health ]; then health; exit; fi

# Of an earlier start of this container.
rm -f "$DTR_SCALE_HEARTBEAT" "$sshd_pid"
[ ! -w /shared ] || mkdir -p /shared/data /shared/runs

if [ "${1:-}" = sshd ]; then
    shift
    [ $# -gt 0 ] || run serve
    serve &
    # The server writes its pid when it listens; without it, `set -e` ends this.
    until [ -e "$sshd_pid" ]; do kill -0 $!; sleep 0.1; done
fi
case "${1:---help}" in
    deepspeed) run "$@" ;;
    *) if type -P "${1:---help}" > /dev/null; then exec "$@"; else exec dtr-scale "${@:---help}"; fi ;;
esac
