#!/bin/sh
# Census of Python files in shell: lines and SHA-256 of each. Every module is an item of its own, so
# that at most the current one is done again, whatever is killed.
#
#   ckptctl submit -- examples/census.sh /usr/lib/python3.11 census.tsv
#
# The same in Perl is census.pl; census.py (files alone, no helper) measures these and more.
set -eu
root=${1:?usage: census.sh DIRECTORY RESULT [COUNT]} result=${2:?where to?} count=${3:-1000000}
list=$CKPTD_DIR/modules
export LC_ALL=C

ckpt step list -- sh -c '
    cd "$1"
    find . \( -name site-packages -o -name dist-packages -o -name test -o -name tests \
        -o -name __pycache__ \) -prune -o -name "*.py" -print | sed "s|^\./||" | sort |
        head -n "$3" >"$2.tmp"
    mv "$2.tmp" "$2"' list "$root" "$list" "$count"

stop=
trap 'stop=1' TERM # asked to leave: what is done is durable, so there is nothing to save
total=$(wc -l <"$list") number=0
ckpt items --keys >"$CKPTD_DIR/done"
while read -r module; do
    number=$((number + 1))
    if grep -qxF -e "$module" "$CKPTD_DIR/done"; then continue; fi
    if [ "$stop" ]; then exit 75; fi
    echo "$module" >>"${CENSUS_BEGUN:-/dev/null}" # the side effect: how often was it begun?
    lines=$(awk 'END { print NR }' "$root/$module")
    digest=$(sha256sum <"$root/$module")
    ckpt item "$module" pass "$lines ${digest%% *}"
    ckpt progress "$number/$total" "$module"
done <"$list"

ckpt items | awk -F '\t' '{ split($3, is, " "); print $1 "\t" is[1] "\t" is[2] }' |
    sort >"$result.tmp"
mv "$result.tmp" "$result"
echo "$total modules"
