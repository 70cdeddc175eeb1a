# What this kind of microVM does. The agent, drives, image and sleep come from mvm.
{ config, pkgs, ... }:
{
  systemd.services.greeting = {
    description = "Says hello";
    wantedBy = [ "multi-user.target" ];
    # Drives are mounted and the network is up then.
    after = [ "mvm-guest-agent.service" ];
    serviceConfig.StandardOutput = "journal+console";
    script = ''
      while true; do
        echo "hello from ${config.mvm.role} with ${config.mvm.profile}"
        ${pkgs.coreutils}/bin/sleep 60
      done
    '';
  };

  # Runs after every wake, before the guest counts as ready.
  mvm.hooks.postWake.greeting = "systemctl restart greeting.service";
}
