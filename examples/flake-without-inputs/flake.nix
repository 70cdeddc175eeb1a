{
  description = "Images without nixpkgs: a kernel and a root file system that are there already";

  # Copy a kernel (an uncompressed ELF), an initial RAM disk and a root file system to parts/ as vmlinux, initrd and
  # rootfs, and say in parts/vmm.json what they need. Then every role and profile of mvm-profiles.toml is built of them.
  outputs =
    { ... }:
    let
      manifest = builtins.fromTOML (builtins.readFile ./mvm-profiles.toml);
      names = builtins.attrNames;
      image = system: role: profile: {
        name = "tenant-${role}-${profile}";
        value = import (./. + "/${manifest.roles.${role}.module}") {
          inherit system role;
          profile = import (./. + "/${manifest.profiles.${profile}.module}");
        };
      };
      images = system: builtins.listToAttrs (builtins.concatMap (role: map (image system role) (names manifest.profiles)) (names manifest.roles));
    in
    {
      packages.x86_64-linux = images "x86_64-linux";
    };
}
