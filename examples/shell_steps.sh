#!/bin/sh
# A pipeline of named steps, then a batch of items, by the helper `ckpt`.
#
#   ckptctl submit -- examples/shell_steps.sh /tmp/steps
#
# A step that succeeded never runs again; an item that has a result is skipped.
set -eu
work=${1:?usage: shell_steps.sh DIRECTORY}
mkdir -p "$work"

ckpt step fetch -- sh -c "seq 1 20 >'$work/numbers.tmp' && mv '$work/numbers.tmp' '$work/numbers'"
ckpt step sort -- sort -n -o "$work/sorted" "$work/numbers"

stop=
trap 'stop=1' TERM # else the signal ends us in the middle of an item
done_before=$(ckpt items --keys)
count=0
while read -r number; do
    count=$((count + 1))
    if echo "$done_before" | grep -qx "$number"; then
        continue
    fi
    echo "$((number * number))" >>"$work/squares"
    ckpt item "$number" pass "$((number * number))"
    ckpt progress "$count/20" "item $number"
    if [ "$stop" ] || ckpt 'stop?'; then # it prints the reason
        exit 75
    fi
done <"$work/sorted"

ckpt save "$work/squares" --progress 20/20
ckpt items | cut -f3 | awk '{sum += $1} END {print "sum of squares", sum}'
