# A NixOS host that runs microVMs: mvm, what it needs, and a fleet that is applied at boot and looked after.
#
#   boot ──> mvm-apply.service      mvm apply -f FLEET             until the fleet is as declared
#   timer ─> mvm-reconcile.service  mvm agent reconcile --desired FLEET   one pass: what died is started again
#
# There is no daemon: each is one process that does its work and ends. MicroVMs outlive it, in the control group of the
# unit that started them, which is why both leave everything but their own process alone.
{ config, lib, pkgs, ... }:
let
  cfg = config.mvm.host;
  format = pkgs.formats.toml { };
  fleet = if cfg.fleetFile != null then cfg.fleetFile else format.generate "fleet.toml" cfg.fleet;
  declared = cfg.fleetFile != null || cfg.fleet != null;

  # What mvm may do, and whatever it starts: bridges, TAPs and rules (net_*), machines as users of their own (set*id,
  # chown, kill), their files (dac_override, fowner), reading a machine's memory into its snapshot (sys_ptrace), and
  # builds: namespaces and mounts of their own, for the processes of nix, its sandbox and the machine of a build, and a
  # Nix store that can be written (sys_admin).
  hardening = {
    CapabilityBoundingSet = [
      "CAP_NET_ADMIN"
      "CAP_NET_RAW"
      "CAP_SETUID"
      "CAP_SETGID"
      "CAP_CHOWN"
      "CAP_KILL"
      "CAP_DAC_OVERRIDE"
      "CAP_FOWNER"
      "CAP_SYS_PTRACE"
      "CAP_SYS_ADMIN"
    ];
    NoNewPrivileges = true;
    # Everything is read-only but these, and a /tmp of its own.
    ProtectSystem = "strict";
    StateDirectory = "mvm";
    CacheDirectory = "mvm";
    RuntimeDirectory = "mvm";
    # Sockets of running machines are there.
    RuntimeDirectoryPreserve = true;
    PrivateTmp = true;
    # mvm builds in processes of its own, never through the daemon, so that it can end a build with all that it started.
    ReadWritePaths = [ "/nix" ];
    # A flake may lie in a home.
    ProtectHome = "read-only";
    DevicePolicy = "closed";
    DeviceAllow = [
      "/dev/kvm rw"
      "/dev/net/tun rw"
    ];
    ProtectClock = true;
    ProtectControlGroups = true;
    ProtectKernelLogs = true;
    ProtectKernelModules = true;
    # Not ProtectHostname: nix's sandbox names a build's own host. Not ProtectKernelTunables: mvm turns forwarding on. Not MemoryDenyWriteExecute and no SystemCallFilter: QEMU
    # inherits both, translates code, and has a filter of its own.
    LockPersonality = true;
    RestrictAddressFamilies = [
      "AF_UNIX"
      "AF_NETLINK"
      "AF_INET"
      "AF_INET6"
      "AF_PACKET"
    ];
    # Those of nix's sandbox, mvm's own among them (mnt, pid, net).
    RestrictNamespaces = [
      "ipc"
      "mnt"
      "net"
      "pid"
      "user"
      "uts"
    ];
    RestrictRealtime = true;
    RestrictSUIDSGID = true;
    SystemCallArchitectures = "native";
  };

  unit = extra: {
    after = [
      "network.target"
      "nftables.service"
      "nix-daemon.socket"
    ];
    # Builds: nix itself, what fetches a flake, and what keeps a build's processes together.
    path = [
      config.nix.package
      pkgs.gitMinimal
      pkgs.util-linux
    ];
    environment.XDG_CACHE_HOME = "/var/cache/mvm";
    serviceConfig =
      hardening
      // {
        Type = "oneshot";
        KillMode = "process";
        TasksMax = "infinity";
      }
      // extra;
  };
in
{
  options.mvm.host = {
    enable = lib.mkEnableOption "mvm on this host";
    package = lib.mkOption {
      type = lib.types.package;
      default = pkgs.callPackage ../packages/mvm.nix { };
      defaultText = lib.literalExpression "mvm, built from its sources";
      description = "mvm.";
    };
    fleet = lib.mkOption {
      type = lib.types.nullOr format.type;
      default = null;
      example = lib.literalExpression ''
        {
          schema_version = 1;
          tenants = [ { tenant_id = "acme"; … } ];
        }
      '';
      description = "The desired-state document, as `mvm schema` describes it. This or `fleetFile`.";
    };
    fleetFile = lib.mkOption {
      type = lib.types.nullOr (lib.types.strMatching "/.*");
      default = null;
      example = "/etc/mvm/fleet.toml";
      description = "The desired-state document as a file of the host, TOML or JSON. This or `fleet`.";
    };
    applyTimeout = lib.mkOption {
      type = lib.types.strMatching "[0-9]+(ms|s|m|h)";
      default = "5m";
      description = "How long the fleet may take at boot until it is as declared.";
    };
    reconcileSeconds = lib.mkOption {
      type = lib.types.nullOr (lib.types.ints.between 5 86400);
      default = 60;
      description = "How often the fleet is looked after; null for never.";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = cfg.fleet == null || cfg.fleetFile == null;
        message = "mvm.host: fleet and fleetFile are both set, and there is one fleet";
      }
      {
        assertion = config.nix.enable;
        message = "mvm.host: nix.enable is off, and images are built by this host's nix with its users for builds";
      }
      {
        assertion = pkgs.stdenv.hostPlatform.isx86_64;
        message = "mvm.host: mvm runs microVMs on x86-64, and this host is ${pkgs.stdenv.hostPlatform.system}";
      }
    ];
    warnings = lib.optional (config.networking.nftables.enable && config.networking.firewall.filterForward) ''
      mvm.host: networking.firewall.filterForward drops what mvm's guests send outside, unless extraForwardRules lets
      interfaces br-tenant-* through.
    '';

    # mvm runs `nft` and `mke2fs` from the system's directories.
    environment.systemPackages = [
      cfg.package
      pkgs.e2fsprogs
      pkgs.nftables
    ];
    boot.kernelModules = [
      "bridge"
      "nf_tables"
      "tun"
    ];
    boot.kernel.sysctl."net.ipv4.ip_forward" = lib.mkDefault 1;

    # Bridges and TAPs are mvm's; nobody else gives them addresses.
    networking.dhcpcd.denyInterfaces = [
      "br-tenant-*"
      "tn[0-9]*"
    ];
    networking.networkmanager.unmanaged = [
      "interface-name:br-tenant-*"
      "interface-name:tn[0-9]*"
    ];

    systemd.services.mvm-apply = lib.mkIf declared (
      lib.mkMerge [
        (unit {
          ExecStart = "${lib.getExe cfg.package} apply -f ${fleet} --timeout ${cfg.applyTimeout}";
          RemainAfterExit = true;
          # mvm's own limit is the one that counts.
          TimeoutStartSec = "infinity";
        })
        {
          description = "Bring up the fleet of microVMs";
          wantedBy = [ "multi-user.target" ];
        }
      ]
    );

    systemd.services.mvm-reconcile = lib.mkIf (declared && cfg.reconcileSeconds != null) (
      lib.mkMerge [
        (unit {
          ExecStart = "${lib.getExe cfg.package} agent reconcile --desired ${fleet}";
        })
        {
          description = "Look after the fleet of microVMs";
          # One pass at a time.
          after = [ "mvm-apply.service" ];
        }
      ]
    );
    systemd.timers.mvm-reconcile = lib.mkIf (declared && cfg.reconcileSeconds != null) {
      description = "Look after the fleet of microVMs";
      wantedBy = [ "timers.target" ];
      timerConfig = {
        OnActiveSec = cfg.reconcileSeconds;
        OnUnitInactiveSec = cfg.reconcileSeconds;
      };
    };
  };
}
