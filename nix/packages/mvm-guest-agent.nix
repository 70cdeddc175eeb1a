# The agent of guests. As a package of `pkgsStatic` it is what mvm's built-in image starts as PID 1.
{ lib, rustPlatform }:
rustPlatform.buildRustPackage {
  pname = "mvm-guest-agent";
  inherit ((builtins.fromTOML (builtins.readFile ../../Cargo.toml)).workspace.package) version;
  src = import ./sources.nix { inherit lib; };
  cargoLock.lockFile = ../../Cargo.lock;
  # Small, since it is in every guest: the workspace's profile of that name.
  buildType = "guest";
  cargoBuildFlags = [
    "--package"
    "mvm-guest-agent"
  ];
  # Its tests run with mvm's own, against mvm.
  doCheck = false;
  meta = {
    description = "The agent inside mvm's guests";
    license = lib.licenses.asl20;
    mainProgram = "mvm-guest-agent";
    platforms = lib.platforms.linux;
  };
}
