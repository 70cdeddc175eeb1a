# mvm, with what it runs on its path and the static guest agent beside it.
{
  lib,
  rustPlatform,
  makeWrapper,
  pkgsStatic,
  e2fsprogs,
  nftables,
  nix,
  qemu,
}:
rustPlatform.buildRustPackage {
  pname = "mvm";
  inherit ((builtins.fromTOML (builtins.readFile ../../Cargo.toml)).workspace.package) version;
  src = import ./sources.nix { inherit lib; };
  cargoLock.lockFile = ../../Cargo.lock;
  cargoBuildFlags = [
    "--package"
    "mvm"
  ];
  # The tests want root, a network and virtual machines: `cargo xtask test` runs them.
  doCheck = false;
  nativeBuildInputs = [ makeWrapper ];
  postInstall = ''
    install -D -m 0755 ${
      pkgsStatic.callPackage ./mvm-guest-agent.nix { }
    }/bin/mvm-guest-agent $out/lib/mvm/mvm-guest-agent
    wrapProgram $out/bin/mvm \
      --prefix PATH : ${
        lib.makeBinPath [
          e2fsprogs
          nftables
          nix
          qemu
        ]
      } \
      --set-default MVM_GUEST_AGENT $out/lib/mvm/mvm-guest-agent
  '';
  meta = {
    description = "Runs fleets of microVMs for many tenants from a declared state";
    license = lib.licenses.asl20;
    mainProgram = "mvm";
    # Images are built for arm64 as well; machines run on x86-64 only.
    platforms = [ "x86_64-linux" ];
  };
}
