# Packet filter rules out of the config drive: a script that writes them with a jq program and loads them whole.
#
# The program gets $config (config.json) and, for each of `documents`, one more document of the drive, or null when the
# drive does not have it. What it writes replaces its own table in one transaction; when the program refuses a document,
# the rules stay as they are and the script fails.
{ pkgs }:
{
  name,
  program,
  documents ? [ ],
  arguments ? { },
}:
let
  read = document: ''
    if [ -e /etc/mvm-config/${document}.json ]; then
      arguments+=(--slurpfile ${document} /etc/mvm-config/${document}.json)
    else
      arguments+=(--argjson ${document} '[null]')
    fi
  '';
  argument = key: value: ''
    arguments+=(--argjson ${key} '${builtins.toJSON value}')
  '';
in
pkgs.writeShellScript "${name}-rules" ''
  set -euo pipefail
  arguments=()
  ${toString (map read ([ "config" ] ++ documents))}
  ${toString (builtins.attrValues (builtins.mapAttrs argument arguments))}
  rules=$(${pkgs.jq}/bin/jq --null-input --raw-output "''${arguments[@]}" --from-file ${program})
  printf '%s\n' "$rules" | ${pkgs.nftables}/bin/nft --file -
''
