# What this repository builds besides images. Images are for two architectures, mvm itself runs on one.
{ pkgs }:
{
  mvm-guest-agent = pkgs.callPackage ./mvm-guest-agent.nix { };
}
// pkgs.lib.optionalAttrs pkgs.stdenv.hostPlatform.isx86_64 rec {
  mvm = pkgs.callPackage ./mvm.nix { };
  default = mvm;
}
