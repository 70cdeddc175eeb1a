{
  description = "mvm: guests by role and profile, the host's module, and mvm itself";

  # mvm's sources lie beside this directory: refer to this flake as a directory of the repository
  # (`git+file:///path/to/mvm?dir=nix`), not as a path of its own.
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      mvmLib = import ./lib { inherit nixpkgs; };
      forSystems = f: lib.genAttrs mvmLib.systems (system: f system nixpkgs.legacyPackages.${system});
      images = mvmLib.mkImages { src = ./.; };
      evaluations = mvmLib.mkChecks { src = ./.; };
    in
    {
      # For users' own flakes: mkGuest, mkGuests, mkImages, mkChecks, readManifest.
      lib = mvmLib;

      packages = forSystems (
        system: pkgs:
        let
          own = import ./packages { inherit pkgs; };
        in
        images.${system}
        // own
        // {
          # Builds all of them.
          everything = pkgs.linkFarm "mvm-everything" (images.${system} // own);
        }
      );

      nixosModules =
        lib.mapAttrs' (name: module: lib.nameValuePair "role-${name}" module) mvmLib.modules.roles
        // lib.mapAttrs' (name: module: lib.nameValuePair "profile-${name}" module) mvmLib.modules.profiles
        // {
          guest = ./guests/baseline.nix;
          mvm-host = ./modules/mvm-host.nix;
          default = ./modules/mvm-host.nix;
        };

      templates.default = {
        path = ./template;
        description = "Microvms of your own for mvm: a manifest, one profile, one role";
        welcomeText = ''
          `nix build .#tenant-hello-base` builds the image. A pool takes it with
          flake_ref = "path:…", role = "hello", profile = "base".
        '';
      };

      devShells = forSystems (_: pkgs: {
        default = pkgs.mkShell {
          packages = [
            pkgs.cargo
            pkgs.rustc
            pkgs.clippy
            pkgs.rustfmt
            pkgs.cargo-nextest
            # What mvm and its tests run.
            pkgs.qemu
            pkgs.nftables
            pkgs.e2fsprogs
            pkgs.iproute2
            pkgs.nix
            pkgs.jq
          ];
        };
      });

      checks = forSystems (
        system: pkgs:
        evaluations.${system}
        // lib.optionalAttrs pkgs.stdenv.hostPlatform.isx86_64 {
          evaluates-host = pkgs.writeText "evaluates-host" (
            builtins.unsafeDiscardStringContext
              (lib.nixosSystem {
                inherit system;
                modules = [ ./tests/host.nix ];
              }).config.system.build.toplevel.drvPath
          );
        }
        # Machines that boot; Nix runs them only where it has the feature `kvm`.
        // import ./tests/vm.nix { inherit pkgs lib mvmLib; }
      );
    };
}
