# What an image of one purpose does without. Everything is a default: a role or profile that needs a part turns it on.
{ lib, ... }:
let
  off = lib.mkDefault false;
in
{
  documentation.enable = off;
  documentation.nixos.enable = off;
  documentation.man.enable = off;
  documentation.info.enable = off;
  documentation.doc.enable = off;

  # No hardware but virtio.
  hardware.enableRedistributableFirmware = off;
  services.lvm.enable = off;
  boot.swraid.enable = off;
  services.udisks2.enable = off;
  console.enable = off;

  # An image is replaced, not switched.
  nix.enable = off;
  system.switch.enable = off;
  system.disableInstallerTools = lib.mkDefault true;
  boot.enableContainers = off;

  # No person works here.
  environment.defaultPackages = lib.mkDefault [ ];
  programs.command-not-found.enable = off;
  programs.nano.enable = off;
  security.polkit.enable = off;
  security.sudo.enable = off;
  fonts.fontconfig.enable = off;
  xdg.autostart.enable = off;
  xdg.icons.enable = off;
  xdg.menus.enable = off;
  xdg.mime.enable = off;
  xdg.sounds.enable = off;

  # The root is in memory: the journal stays small and is gone with the guest.
  services.journald.extraConfig = lib.mkDefault ''
    Storage=volatile
    RuntimeMaxUse=16M
  '';
  services.logrotate.enable = off;
}
