# capability-imessage: a placeholder for a connector that needs another platform. It boots, reaches nothing but its own
# tenant's network, and says that it is a placeholder.
{ pkgs, ... }:
let
  loadRules = import ./rules.nix { inherit pkgs; } {
    name = "mvm-capability-imessage";
    program = ./capability-imessage/rules.jq;
  };
in
{
  config = {
    mvm.role = "capability-imessage";

    # Closed from before the network is there until the tenant's network is known.
    networking.nftables = {
      enable = true;
      tables.mvm_isolated = {
        family = "inet";
        content = ''
          chain input {
            type filter hook input priority filter; policy drop;
            iifname "lo" accept
          }
          chain output {
            type filter hook output priority filter; policy drop;
            oifname "lo" accept
          }
        '';
      };
    };

    systemd.services.mvm-capability-imessage = {
      description = "Placeholder of the iMessage capability";
      wantedBy = [ "multi-user.target" ];
      wants = [ "mvm-guest-agent.service" ];
      after = [
        "mvm-guest-agent.service"
        "nftables.service"
      ];
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
        ExecStartPre = loadRules;
        ExecStart = "${pkgs.coreutils}/bin/echo capability-imessage: this is a placeholder, there is no connector in this image";
        StandardOutput = "journal+console";
      };
    };
    mvm.hooks.postWake.capability-imessage = "systemctl restart mvm-capability-imessage.service";
  };
}
