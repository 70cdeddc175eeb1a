# gateway: the tenant's entry. It forwards for the tenant's network, and lets in from outside only what its pool exposes.
#
# Its rules come from the config drive, anew at each boot and wake:
#
#   config.json    network.address says which network is the tenant's: whatever comes from there is let in and forwarded
#   gateway.json   the ports that are open to everybody else. The drive may lack it: then there are none.
#
#     {
#       "version": 1,
#       "allow": [
#         { "protocol": "tcp", "port": 443 },
#         { "protocol": "udp", "port": 51820 }
#       ]
#     }
#
#   `version` is 1. `allow` may be absent or empty. `protocol` is "tcp" or "udp", `port` is a whole number from 1 to 65535.
#   Other keys are ignored. A document that is anything else is refused as a whole: the rules stay as they were (closed,
#   at boot), mvm-gateway.service fails and says why, and the guest is not ready. With `ports` in the manifest's role, a
#   port that is not among them is refused in the same way.
{ config, lib, pkgs, ... }:
let
  cfg = config.mvm.gateway;
  loadRules = import ./rules.nix { inherit pkgs; } {
    name = "mvm-gateway";
    program = ./gateway/rules.jq;
    documents = [ "gateway" ];
    arguments.may = config.mvm.ports;
  };
in
{
  options.mvm.gateway = {
    healthSeconds = lib.mkOption {
      type = lib.types.ints.between 5 3600;
      default = 30;
      description = ''
        How often forwarding and rules are looked at. What is missing is set up again; when that fails,
        `mvm-gateway.service` is failed and the guest not ready.
      '';
    };
  };

  config = {
    mvm.role = "gateway";

    boot.kernel.sysctl."net.ipv4.ip_forward" = 1;

    # Closed from before the network is there until the rules are read.
    networking.nftables = {
      enable = true;
      tables.mvm_gateway = {
        family = "inet";
        content = ''
          chain input {
            type filter hook input priority filter; policy drop;
            iifname "lo" accept
          }
          chain forward {
            type filter hook forward priority filter; policy drop;
          }
        '';
      };
    };

    systemd.services.mvm-gateway = {
      description = "Forwarding and packet filter of the gateway";
      wants = [ "mvm-guest-agent.service" ];
      after = [
        "mvm-guest-agent.service"
        "nftables.service"
      ];
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
        ExecStart = [
          "${pkgs.procps}/bin/sysctl -q net.ipv4.ip_forward=1"
          loadRules
        ];
      };
      wantedBy = [ "multi-user.target" ];
    };
    mvm.hooks.postWake.gateway = "systemctl restart mvm-gateway.service";

    systemd.services.mvm-gateway-health = {
      description = "Look at forwarding and packet filter of the gateway";
      after = [ "mvm-gateway.service" ];
      path = [ pkgs.nftables ];
      serviceConfig.Type = "oneshot";
      script = ''
        if [ "$(cat /proc/sys/net/ipv4/ip_forward)" != 1 ]; then
          echo "the kernel does not forward"
        elif ! nft list chain inet mvm_gateway forward >/dev/null; then
          echo "the rules are not loaded"
        elif systemctl is-active --quiet mvm-gateway.service; then
          exit 0
        fi
        systemctl restart mvm-gateway.service
      '';
    };
    systemd.timers.mvm-gateway-health = {
      description = "Look at the gateway every ${toString cfg.healthSeconds} s";
      wantedBy = [ "timers.target" ];
      timerConfig = {
        OnActiveSec = cfg.healthSeconds;
        OnUnitInactiveSec = cfg.healthSeconds;
        AccuracySec = 1;
      };
    };

    # For whoever looks into a gateway with `mvm shell`.
    environment.systemPackages = [
      pkgs.nftables
      pkgs.iproute2
    ];
  };
}
