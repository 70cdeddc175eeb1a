# role: worker
# expect: The option `mvm.image.format' has conflicting definitions.
# expect: bad/conflict.nix: "erofs"
{ lib, ... }:
{
  config = lib.mkMerge [
    { mvm.image.format = "erofs"; }
    { mvm.image.format = "squashfs"; }
  ];
}
