{
  description = "MicroVMs of our own for mvm";

  # Where mvm's sources are, with the directory of its flake. For builds on one host, a name in its registry:
  #   nix registry add mvm 'git+file:///path/to/mvm?dir=nix'
  # A microVM that builds (--builder vm; what --builder auto takes for more than one tenant) has no registry and no path
  # of its host. For it, write an address that is reached from outside of the host, such as
  #   git+https://git.example.org/mvm?dir=nix
  # and build with --builder-egress internet, which nixpkgs needs too.
  inputs.mvm.url = "flake:mvm";

  outputs =
    { mvm, ... }:
    {
      # tenant-<role>-<profile> for every role and profile of mvm-profiles.toml.
      packages = mvm.lib.mkImages { src = ./.; };
      # Evaluates each of them and builds none.
      checks = mvm.lib.mkChecks { src = ./.; };
    };
}
