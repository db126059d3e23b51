#!/bin/sh
# Adds up 1 to N and resumes with files alone: no library, no helper, any shell.
#
#   ckptctl submit -- examples/shell_resume.sh 100000
#
# Kill it, restart the daemon, pull the plug: it goes on from its last checkpoint.
set -eu
total=${1:-10000}
every=${2:-1000}

i=0 sum=0 seq=$CKPTD_SEQ
if [ "$CKPTD_RESUME" = 1 ]; then
    read -r i sum <"$CKPTD_LAST/state"
    echo "resumed at $i"
fi

save() {
    echo "$i $sum" >"$CKPTD_DIR/stage/state"
    seq=$((seq + 1))
    mv "$CKPTD_DIR/stage" "$CKPTD_DIR/ckpt/$seq" # published: all of it or nothing
    mkdir "$CKPTD_DIR/stage"
}

stop=
trap 'stop=1' TERM # the daemon asks before it forces

while [ "$i" -lt "$total" ]; do
    i=$((i + 1))
    sum=$((sum + i))
    if [ -n "$stop" ]; then
        save
        exit 75 # not finished, start me again
    fi
    if [ $((i % every)) -eq 0 ]; then
        save
    fi
done
echo "sum $sum"
