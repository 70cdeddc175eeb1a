# role: host
# expect: mvm.host: nix.enable is off
{ nix.enable = false; }
