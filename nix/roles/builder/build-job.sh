# usage: build-job.sh JOB RESULT [NIX-OPTION]...
#
# Builds what JOB/job.json names, and leaves in the directory RESULT:
#
#   image/        the result, copied out of the store
#   build.log     what nix said
#   result.json   {"version":1,"status":"built"} or {"version":1,"status":"failed","why":"…"}; written last
#
# Fails when the build does. JOB is only read.
set -euo pipefail

job=$1 result=$2
shift 2

answer() {
  jq --null-input --arg status "$1" --arg why "$2" \
    '{version: 1, status: $status} + if $why == "" then {} else {why: $why} end' >"$result/result.json.new"
  mv "$result/result.json.new" "$result/result.json"
  sync "$result/result.json"
}

fail() {
  echo "$1" >&2
  answer failed "$1"
  exit 1
}

rm -rf "$result/image" "$result/result.json"

version=$(jq '.version' "$job/job.json" 2>/dev/null) || fail "job.json: not there, or not JSON"
[ "$version" = 1 ] || fail "job.json: version is $version, and only 1 is known"
installable=$(jq --raw-output '.installable | if type == "string" then . else "" end' "$job/job.json")
[ -n "$installable" ] || fail "job.json: installable is missing"
case $installable in
-*) fail "job.json: installable begins with a hyphen" ;;
esac

built=$(nix --extra-experimental-features 'nix-command flakes' "$@" \
  build --no-link --no-write-lock-file --json "$installable" 2>"$result/build.log") ||
  fail "nix build $installable failed; build.log says why"
out=$(jq --raw-output 'if length == 1 then .[0].outputs.out // "" else "" end' <<<"$built")
[ -n "$out" ] || fail "$installable is not one thing with an output named out"

cp --recursive --dereference --no-preserve=mode,ownership "$out" "$result/image" ||
  fail "$out does not fit on the result drive"
answer built ""
