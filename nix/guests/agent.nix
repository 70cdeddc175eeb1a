# The guest agent as a service, and what runs around drain, sleep and wake.
#
#   mvm ──port──> agent ──runs──> /etc/mvm/hooks/<moment>.d/50-systemd ──restarts──> mvm-<moment>.target
#                                                                                        wants: mvm-<moment>-<name>.service
#
# A hook ends when all units of its target have: the agent waits for that, up to the host's deadline, and reports
# units that failed. A module adds to a moment with `mvm.hooks.<moment>.<name>`, or with a oneshot service of its own
# that is wanted by the target.
{ config, lib, pkgs, ... }:
let
  cfg = config.mvm.agent;
  systemctl = "${config.systemd.package}/bin/systemctl";

  moments = {
    drain = {
      unit = "mvm-drain";
      directory = "drain.d";
      description = "Before sleep or stop, while work still runs";
    };
    preSleep = {
      unit = "mvm-pre-sleep";
      directory = "pre-sleep.d";
      description = "Directly before the guest is frozen";
    };
    postWake = {
      unit = "mvm-post-wake";
      directory = "post-wake.d";
      description = "After a wake, before the guest is ready";
    };
  };

  # The units of a target are oneshots, so a restart of the target runs each of them once more.
  hook =
    moment:
    pkgs.writeShellScript "${moment.unit}-hook" ''
      ${systemctl} restart ${moment.unit}.target || exit 1
      wants=$(${systemctl} show --property=Wants --value ${moment.unit}.target)
      # Without a unit `is-failed` would speak of the whole system.
      if [ -n "$wants" ] && ${systemctl} is-failed --quiet $wants; then
        exit 1
      fi
    '';

  hookService = moment: name: script: {
    name = "${moment.unit}-${name}";
    value = {
      description = "${moment.description}: ${name}";
      wantedBy = [ "${moment.unit}.target" ];
      before = [ "${moment.unit}.target" ];
      # A target that is restarted must find them ended.
      serviceConfig.Type = "oneshot";
      inherit script;
    };
  };
in
{
  options.mvm = {
    agent = {
      package = lib.mkOption {
        type = lib.types.package;
        default = pkgs.callPackage ../packages/mvm-guest-agent.nix { };
        defaultText = lib.literalExpression "mvm-guest-agent, built from mvm's sources";
        description = "The guest agent.";
      };
      console = lib.mkOption {
        type = lib.types.bool;
        default = true;
        description = "Whether what the agent says also goes to the serial console, where `mvm logs --source console` shows it.";
      };
    };
    hooks = lib.mapAttrs (
      _: moment:
      lib.mkOption {
        type = lib.types.attrsOf lib.types.lines;
        default = { };
        example = {
          flush = "redis-cli save";
        };
        description = "${moment.description}: shell scripts by name, each the service `${moment.unit}-<name>`.";
      }
    ) moments;
  };

  config = {
    systemd.services = lib.mkMerge (
      [
        {
          mvm-guest-agent = {
            description = "Agent of mvm: drives, network, commands, sleep and wake";
            # Started units find drives mounted and the network up: the agent says when that is so.
            wantedBy = [
              "multi-user.target"
              "network-online.target"
            ];
            before = [
              "network.target"
              "network-online.target"
            ];
            wants = [ "network.target" ];
            serviceConfig = {
              Type = "notify";
              ExecStart = "${cfg.package}/bin/mvm-guest-agent serve";
              StandardError = if cfg.console then "journal+console" else "journal";
              Restart = "always";
              RestartSec = 1;
              # Commands run in its group; one that takes all memory must not take the agent with it.
              OOMPolicy = "continue";
              TasksMax = "infinity";
              # No sandbox: what it mounts must be seen by everybody, and `mvm exec` is root in the guest.
            };
          };
        }
      ]
      ++ lib.mapAttrsToList (
        moment: value: lib.mapAttrs' (hookService value) config.mvm.hooks.${moment}
      ) moments
    );

    systemd.targets = lib.mapAttrs' (
      _: moment: lib.nameValuePair moment.unit { inherit (moment) description; }
    ) moments;

    environment.etc = lib.mapAttrs' (
      _: moment: lib.nameValuePair "mvm/hooks/${moment.directory}/50-systemd" { source = hook moment; }
    ) moments;
  };
}
