# What mvm takes: vmlinux, initrd (optional), rootfs and vmm.json in one directory.
#
# The build runs programs of the host (`mkdir`, `cp`), so Nix must build without a sandbox: --option sandbox false.
{
  system,
  role,
  profile,
}:
let
  files = builtins.attrNames (builtins.readDir profile.parts);
  wanted = [
    "rootfs"
    "vmlinux"
    "vmm.json"
  ];
  missing = builtins.filter (file: !builtins.elem file files) wanted;
in
if missing != [ ] then
  throw "role ${role}, profile ${profile.name}: parts/ lacks ${builtins.concatStringsSep ", " missing}; flake.nix says what belongs there"
else
  derivation {
    name = "tenant-${role}-${profile.name}";
    inherit system;
    inherit (profile) parts;
    builder = "/bin/sh";
    args = [
      "-euc"
      ''
        PATH=/usr/bin:/bin
        mkdir "$out"
        for file in vmlinux initrd rootfs vmm.json; do
          if [ -e "$parts/$file" ]; then cp "$parts/$file" "$out/$file"; fi
        done
      ''
    ];
  }
