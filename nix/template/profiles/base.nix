# What programs find in the image, whatever the role.
{ mvm, pkgs, ... }:
{
  imports = [ mvm.profiles.minimal ];

  environment.systemPackages = [ pkgs.jq ];
}
