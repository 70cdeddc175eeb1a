# usage: build-job.sh JOB RESULT [NIX-OPTION]...
#
# Builds what a job drive names, and writes the result as mvm reads it:
#
#   JOB/job.json   {"version":1,"attribute":"packages.x86_64-linux.tenant-worker-minimal"}
#   JOB/tree/      the flake's sources
#   RESULT         a device or a file, which gets one tar archive of those of vmlinux, initrd, rootfs and vmm.json that there are
#
# What nix says goes to standard error. When something is wrong the last line says what, and RESULT stays as it was.
set -euo pipefail

job=$1 result=$2
shift 2

fail() {
  echo "mvm-build-job: $1" >&2
  exit 1
}

version=$(jq '.version' "$job/job.json" 2>/dev/null) || fail "job.json: not there, or not JSON"
[ "$version" = 1 ] || fail "job.json: version is $version, and only 1 is known"
attribute=$(jq --raw-output '.attribute | if type == "string" then . else "" end' "$job/job.json")
[ -n "$attribute" ] || fail "job.json: attribute is missing"
case $attribute in
*[!A-Za-z0-9._-]*) fail "job.json: attribute is not made of letters, digits, dots, hyphens and underscores" ;;
esac

built=$(nix --extra-experimental-features 'nix-command flakes' "$@" \
  build --no-link --no-write-lock-file --json "path:$job/tree#$attribute") || fail "the build of $attribute failed"
out=$(jq --raw-output 'if length == 1 then .[0].outputs.out // "" else "" end' <<<"$built")
[ -n "$out" ] || fail "$attribute is not one thing with an output named out"
[ -d "$out" ] || fail "$attribute yields a file, and should yield a directory"

cd "$out"
files=()
for file in vmlinux initrd rootfs vmm.json; do
  if [ -f "$file" ]; then
    files+=("$file")
  fi
done
[ ${#files[@]} != 0 ] || fail "$attribute yields no file of an image"
# Links are followed here, where what they lead to is.
tar --create --dereference --hard-dereference --file "$result" "${files[@]}" || fail "$attribute does not fit on the result drive"
sync "$result"
