# What stands in for the flake nixpkgs where that cannot be had.
let
  lib = import ./lib.nix // {
    inherit nixosSystem;
  };
  pkgsFor = import ./pkgs.nix { inherit lib nixosSystem; };

  nixosSystem =
    {
      system,
      modules,
      specialArgs ? { },
    }:
    let
      evaluated = lib.evalModules {
        modules = [ ./options.nix ] ++ modules;
        specialArgs = specialArgs // {
          inherit lib;
          pkgs = pkgsFor system;
        };
      };
    in
    {
      inherit (evaluated) options;
      config = lib.verify evaluated;
    };
in
{
  inherit lib;
  legacyPackages = lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] pkgsFor;
}
