#!/bin/sh
# summarise_sass.sh NVDISASM CUBIN OUT
# How often each opcode stands in a cubin, one "OPCODE count" a line: QGMMA and HGMMA for
# build_info(), LDL and STL (none) for whoever wonders.
set -eu
nvdisasm=$1 cubin=$2 out=$3
"$nvdisasm" -c "$cubin" >"$out.listing"
awk 'match($0, /\/\*[0-9a-f]+\*\//) {
  text = substr($0, RSTART + RLENGTH)
  sub(/^[ \t]*(@!?U?P[0-9T]+[ \t]+)?/, "", text)
  if (match(text, /^[A-Z][A-Z0-9_]*/)) count[substr(text, 1, RLENGTH)]++
}
END { for (opcode in count) print opcode, count[opcode] }' "$out.listing" | sort >"$out"
rm -f "$out.listing"
