# worker: runs the tenant's workload, and exposes nothing outside.
#
# The workload is the pool's: mvm writes it into config.json on the config drive, and the agent starts it, keeps it up
# and keeps what it prints for `mvm logs`. It finds the image's programs by name. An image may bring units of its own
# besides; this module takes those through sleep.
{ config, lib, ... }:
let
  cfg = config.mvm.worker;
  units = lib.escapeShellArgs cfg.drainUnits;
  known = lib.concatMap (kind: map (name: "${name}.${kind}") (lib.attrNames config.systemd."${kind}s")) [
    "service"
    "socket"
    "timer"
  ];
in
{
  options.mvm.worker.drainUnits = lib.mkOption {
    type = lib.types.listOf lib.types.str;
    default = [ ];
    example = [ "web.service" ];
    description = ''
      Units of the image that are stopped when the guest drains, so that they finish what they are at, and started again
      after a wake. A unit that the image does not have is refused.
    '';
  };

  config = {
    mvm.role = "worker";

    assertions = map (unit: {
      assertion = lib.elem unit known;
      message = "mvm: role worker: mvm.worker.drainUnits names ${unit}, and the image has no such unit";
    }) cfg.drainUnits;

    # The workload may look for the file, and takes no new work while it is there.
    mvm.hooks.drain.worker = ''
      mkdir -p /run/mvm
      touch /run/mvm/draining
      ${lib.optionalString (cfg.drainUnits != [ ]) "systemctl stop -- ${units}"}
    '';
    mvm.hooks.postWake.worker = ''
      ${lib.optionalString (cfg.drainUnits != [ ]) "systemctl start -- ${units}"}
      rm -f /run/mvm/draining
    '';
  };
}
