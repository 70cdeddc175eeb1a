# mvm's sources as the builds of its packages see them: a change of documentation or of an image builds nothing anew.
{ lib }:
lib.fileset.toSource {
  root = ../..;
  fileset = lib.fileset.unions [
    ../../Cargo.toml
    ../../Cargo.lock
    ../../crates
    ../../src
    ../../xtask
    # Embedded into the program, or read when it is built.
    ../../nix/template
    ../../nix/mvm-profiles.toml
  ];
}
