# The options of NixOS that mvm's modules set or read, with their types: a module that sets another one, or one of these
# to a value of another kind, is refused. What they mean is NixOS' affair; here they only have to be there.
{ lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  inherit (types)
    anything
    attrsOf
    bool
    either
    int
    lines
    listOf
    nullOr
    package
    path
    raw
    str
    submodule
    ;

  option = type: default: mkOption { inherit type default; };
  switch = option bool;
  # A scalar of a unit file, or several lines of it.
  value = nullOr (either bool (either int (either str path)));
  section = attrsOf (either (listOf value) value);
  units = option (listOf str) [ ];

  dependencies = {
    enable = switch true;
    description = option str "";
    after = units;
    before = units;
    conflicts = units;
    requiredBy = units;
    requires = units;
    wantedBy = units;
    wants = units;
    unitConfig = option section { };
  };
  unit = more: option (attrsOf (submodule { options = dependencies // more; })) { };
in
{
  options = {
    assertions = option (listOf anything) [ ];
    warnings = option (listOf str) [ ];

    boot = {
      enableContainers = switch true;
      initrd = {
        includeDefaultModules = switch true;
        kernelModules = option (listOf str) [ ];
        systemd.enable = switch false;
      };
      kernel.sysctl = option (attrsOf (nullOr (either bool (either int str)))) { };
      kernelModules = option (listOf str) [ ];
      kernelPackages = option raw pkgs.linuxPackages;
      kernelParams = option (listOf str) [ ];
      loader.grub.enable = switch true;
      swraid.enable = switch false;
    };
    console.enable = switch true;
    documentation = {
      enable = switch true;
      doc.enable = switch true;
      info.enable = switch true;
      man.enable = switch true;
      nixos.enable = switch true;
    };
    environment = {
      defaultPackages = option (listOf package) [ ];
      etc = option (attrsOf (submodule {
        options = {
          source = option (nullOr path) null;
          text = option (nullOr lines) null;
          mode = option str "symlink";
        };
      })) { };
      stub-ld.enable = switch true;
      systemPackages = option (listOf package) [ ];
    };
    fileSystems = option (attrsOf (submodule {
      options = {
        device = option (nullOr str) null;
        fsType = option str "auto";
        neededForBoot = switch false;
        noCheck = switch false;
        options = option (listOf str) [ ];
        overlay = {
          lowerdir = option (nullOr (listOf str)) null;
          upperdir = option (nullOr str) null;
          workdir = option (nullOr str) null;
        };
      };
    })) { };
    fonts.fontconfig.enable = switch true;
    hardware.enableRedistributableFirmware = switch true;
    networking = {
      dhcpcd.denyInterfaces = option (listOf str) [ ];
      enableIPv6 = switch true;
      firewall = {
        enable = switch true;
        filterForward = switch false;
      };
      hostName = option str "nixos";
      networkmanager.unmanaged = option (listOf str) [ ];
      nftables = {
        enable = switch false;
        tables = option (attrsOf (submodule {
          options = {
            family = mkOption { type = types.enum [ "ip" "ip6" "inet" "arp" "bridge" "netdev" ]; };
            content = mkOption { type = lines; };
          };
        })) { };
      };
      resolvconf.enable = switch true;
      useDHCP = switch true;
      useNetworkd = switch false;
      usePredictableInterfaceNames = switch true;
    };
    nix = {
      channel.enable = switch true;
      enable = switch true;
      package = option package pkgs.nix;
      settings = option (attrsOf anything) { };
    };
    programs = {
      bash.completion.enable = switch true;
      command-not-found.enable = switch true;
      less.lessopen = option (nullOr str) "|less %s";
      nano.enable = switch true;
    };
    security = {
      polkit.enable = switch false;
      sudo.enable = switch true;
    };
    services = {
      journald.extraConfig = option lines "";
      logrotate.enable = switch true;
      lvm.enable = switch true;
      openssh.enable = switch false;
      timesyncd.enable = switch true;
      udisks2.enable = switch false;
    };
    system = {
      boot.loader.initrdFile = option str "initrd";
      build = option (attrsOf raw) { };
      disableInstallerTools = switch false;
      stateVersion = option str "0";
      switch.enable = switch true;
    };
    systemd = {
      generators = option (attrsOf path) { };
      mounts = option (listOf (submodule {
        options = dependencies // {
          what = mkOption { type = str; };
          where = mkOption { type = str; };
          type = option str "";
          options = option str "";
          mountConfig = option section { };
        };
      })) [ ];
      package = option package pkgs.systemd;
      paths = unit { pathConfig = option section { }; };
      services = unit {
        environment = option (attrsOf (nullOr (either str path))) { };
        path = option (listOf (either package str)) [ ];
        script = option lines "";
        serviceConfig = option section { };
      };
      sockets = unit { socketConfig = option section { }; };
      targets = unit { };
      timers = unit { timerConfig = option section { }; };
      tmpfiles.rules = option (listOf str) [ ];
    };
    time.timeZone = option (nullOr str) null;
    users = {
      allowNoPasswordLogin = switch false;
      mutableUsers = switch true;
    };
    virtualisation = {
      emptyDiskImages = option (listOf int) [ ];
      memorySize = option int 1024;
      qemu.options = option (listOf str) [ ];
    };
    xdg = {
      autostart.enable = switch true;
      icons.enable = switch true;
      menus.enable = switch true;
      mime.enable = switch true;
      sounds.enable = switch true;
    };
  };

  config.system.build = {
    initialRamdisk = pkgs.writeText "initrd" "";
    toplevel = pkgs.writeText "system" "";
  };
}
