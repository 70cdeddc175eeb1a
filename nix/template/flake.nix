{
  description = "MicroVMs of our own for mvm";

  # Where mvm's sources are, with the directory of its flake:
  #   nix registry add mvm 'git+file:///path/to/mvm?dir=nix'
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
