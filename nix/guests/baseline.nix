# What every guest of mvm has, whatever its role and profile.
#
#   image.nix    kernel, initrd, root file system: what mvm boots
#   agent.nix    the guest agent as a service, and the targets around drain, sleep and wake
#   drives.nix   drives by label
#   small.nix    what an image does without
#
# There are no addresses in an image: the agent takes them from the config drive. Nothing of a tenant is in it either.
{ config, lib, ... }:
let
  cfg = config.mvm;
  called = if cfg.role == null then "profile ${toString cfg.profile}" else "role ${cfg.role}, profile ${toString cfg.profile}";
  units = lib.concatMap (kind: map (name: "${name}.${kind.ending}") (lib.attrNames kind.of)) [
    { ending = "service"; of = config.systemd.services; }
    { ending = "socket"; of = config.systemd.sockets; }
    { ending = "target"; of = config.systemd.targets; }
    { ending = "timer"; of = config.systemd.timers; }
    { ending = "path"; of = config.systemd.paths; }
  ];
  # What the declaration of secrets below adds to a service is not a service.
  starts =
    unit:
    let
      service = config.systemd.services.${lib.removeSuffix ".service" unit} or null;
    in
    service != null && (service.script != "" || service.serviceConfig ? ExecStart);
  secretive = lib.filter (service: service.secrets != [ ]) cfg.services;
in
{
  imports = [
    ./agent.nix
    ./drives.nix
    ./image.nix
    ./small.nix
  ];

  options.mvm = {
    role = lib.mkOption {
      type = lib.types.nullOr (lib.types.strMatching "[a-z]([a-z0-9-]*[a-z0-9])?");
      default = null;
      example = "worker";
      description = ''
        The role of this guest, which a role's module sets to its own name: two roles in one guest conflict.
        It is part of the image's name, and is in `/etc/mvm/image.json`.
      '';
    };
    profile = lib.mkOption {
      type = lib.types.nullOr (lib.types.strMatching "[a-z]([a-z0-9-]*[a-z0-9])?");
      default = null;
      example = "minimal";
      description = "The profile of this guest; part of the image's name, and in `/etc/mvm/image.json`.";
    };
    services = lib.mkOption {
      type = lib.types.listOf (
        lib.types.submodule {
          options = {
            unit = lib.mkOption {
              type = lib.types.str;
              description = "The unit, with its ending.";
            };
            secrets = lib.mkOption {
              type = lib.types.listOf lib.types.str;
              default = [ ];
              description = "Secrets without which a service is not started.";
            };
          };
        }
      );
      default = [ ];
      example = [
        {
          unit = "sync.service";
          secrets = [ "sync-token" ];
        }
      ];
      description = ''
        Units that must be active before the guest counts as ready, as the manifest names them. They are started at
        boot, after the agent, and a unit that the image does not have is refused. One that needs secrets is started
        when they are there, at boot or after a wake.
      '';
    };
    ports = lib.mkOption {
      type = lib.types.nullOr (
        lib.types.listOf (
          lib.types.submodule {
            options = {
              port = lib.mkOption {
                type = lib.types.port;
                description = "The port.";
              };
              protocol = lib.mkOption {
                type = lib.types.enum [
                  "tcp"
                  "udp"
                ];
                description = "Its protocol.";
              };
            };
          }
        )
      );
      default = null;
      description = ''
        The ports that the role may expose, as the manifest names them; null for no restriction. The gateway lets no
        others in, whatever its configuration says. It is in `/etc/mvm/image.json`.
      '';
    };
  };

  config = {
    assertions =
      map (service: {
        assertion = lib.elem service.unit units && (service.secrets == [ ] || starts service.unit);
        message = "mvm: ${called}: the manifest's services name ${service.unit}, and the image has no such unit";
      }) cfg.services
      ++ map (service: {
        assertion = lib.hasSuffix ".service" service.unit;
        message = "mvm: ${called}: the manifest gives ${service.unit} secrets, and only a service can need them";
      }) secretive
      ++ [
        {
          assertion = !config.services.openssh.enable;
          message = "mvm: ${called}: services.openssh.enable is set, and guests have no SSH; `mvm exec` and `mvm shell` do that";
        }
        {
          assertion = !config.networking.useDHCP && !config.networking.useNetworkd;
          message = "mvm: ${called}: networking.useDHCP or networking.useNetworkd is set, and the agent alone configures the network, from the config drive";
        }
      ];

    environment.etc."mvm/image.json".text = builtins.toJSON {
      version = 1;
      inherit (cfg) role profile services ports;
    };

    # What must be active must also be started.
    systemd.targets.multi-user.wants = map (service: service.unit) cfg.services;
    systemd.services = lib.listToAttrs (
      map (service: {
        name = lib.removeSuffix ".service" service.unit;
        value = {
          after = [ "mvm-guest-agent.service" ];
          unitConfig.ConditionPathExists = map (secret: "/run/secrets/${secret}") service.secrets;
        };
      }) secretive
    )
    // {
      # Nobody logs in: commands come through the agent, and the serial console is written to a file by the host.
      "getty@tty1".enable = false;
      "serial-getty@ttyS0".enable = false;
      "serial-getty@hvc0".enable = false;
    };
    # Secrets may have come while the guest slept.
    mvm.hooks.postWake = lib.mkIf (secretive != [ ]) {
      services = "systemctl start -- ${lib.escapeShellArgs (map (service: service.unit) secretive)}";
    };

    networking = {
      # The agent names the guest as the config drive says.
      hostName = lib.mkDefault "";
      useDHCP = lib.mkDefault false;
      # One interface, with the kernel's name for it.
      usePredictableInterfaceNames = lib.mkDefault false;
      # The agent writes the name servers to /run/resolv.conf.
      resolvconf.enable = false;
      # The host's rules separate guests; roles that filter have tables of their own.
      firewall.enable = lib.mkDefault false;
      enableIPv6 = lib.mkDefault false;
    };
    environment.etc."resolv.conf".source = "/run/resolv.conf";
    # Only a gateway forwards; the agent sets it again from the config drive.
    boot.kernel.sysctl."net.ipv4.ip_forward" = lib.mkDefault 0;

    users.mutableUsers = false;
    users.allowNoPasswordLogin = true;
    # systemd would offer SSH over vsock where it finds an sshd.
    systemd.generators.systemd-ssh-generator = "/dev/null";

    # The agent sets the clock, at boot from the machine's and after a wake from the host's.
    services.timesyncd.enable = lib.mkDefault false;
    time.timeZone = lib.mkDefault "UTC";

    system.stateVersion = lib.mkDefault "24.11";
  };
}
