# builder: runs one Nix build and ends. Nothing is kept: its root and what it adds to the store are in memory.
#
#   vdc, ext4, label mvm-job, read-only, at /job   job.json and tree/: what to build of which flake
#   vde, no file system                            the result, one archive
#
# They are the drives that mvm gives to a microVM that builds (src/vm/builder), written and read by builder/build-job.sh.
# The build starts when the job drive is there; afterwards the guest powers off. Without a job drive it is a guest with
# Nix in it, for `mvm exec`.
{ config, lib, pkgs, ... }:
let
  cfg = config.mvm.builder;
  buildJob = pkgs.writeShellApplication {
    name = "mvm-build-job";
    runtimeInputs = [
      config.nix.package
      pkgs.coreutils
      pkgs.gitMinimal
      pkgs.gnutar
      pkgs.jq
    ];
    text = builtins.readFile ./builder/build-job.sh;
  };
in
{
  options.mvm.builder = {
    timeoutSeconds = lib.mkOption {
      type = lib.types.ints.positive;
      default = 3600;
      description = "How long a build may take; one that takes longer is ended, and leaves no result.";
    };
    resultDevice = lib.mkOption {
      type = lib.types.strMatching "/dev/[A-Za-z0-9/_-]+";
      default = "/dev/vde";
      description = "The drive that the result is written to, over whatever is on it: mvm's fifth, after root, configuration, job and work.";
    };
    powerOff = lib.mkOption {
      type = lib.types.bool;
      default = true;
      description = "Whether the guest powers off after a job.";
    };
  };

  config = {
    mvm.role = "builder";
    mvm.image.writableStore = true;
    mvm.memoryMiB.builder = lib.mkDefault 1792;

    mvm.drives.job = { };

    nix = {
      enable = true;
      channel.enable = false;
      settings = {
        experimental-features = [
          "nix-command"
          "flakes"
        ];
        # What a job names is not to be trusted with the machine, short as its life is.
        sandbox = true;
        accept-flake-config = false;
      };
    };

    # The store came with the image; Nix has to be told what is in it.
    systemd.services.mvm-builder-store = {
      description = "Tell Nix what the image's store holds";
      wantedBy = [ "multi-user.target" ];
      before = [
        "nix-daemon.service"
        "nix-daemon.socket"
      ];
      unitConfig = {
        DefaultDependencies = false;
        # A machine of a test has another store.
        ConditionPathExists = "/nix/store/nix-path-registration";
      };
      after = [ "local-fs.target" ];
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
      };
      script = ''
        ${config.nix.package}/bin/nix-store --load-db </nix/store/nix-path-registration
      '';
    };

    systemd.services.mvm-build = {
      description = "The job of this builder";
      # Pulled in by the drive, when there is one.
      wantedBy = [ "dev-disk-by\\x2dlabel-mvm\\x2djob.device" ];
      wants = [ "network-online.target" ];
      requires = [ "mvm-builder-store.service" ];
      after = [
        "mvm-builder-store.service"
        "network-online.target"
      ];
      unitConfig = {
        RequiresMountsFor = "/job";
        AssertPathExists = cfg.resultDevice;
      } // lib.optionalAttrs cfg.powerOff {
        SuccessAction = "poweroff";
        FailureAction = "poweroff";
      };
      serviceConfig = {
        Type = "oneshot";
        TimeoutStartSec = cfg.timeoutSeconds;
        ExecStart = "${lib.getExe buildJob} /job ${cfg.resultDevice}";
        StandardOutput = "journal+console";
        StandardError = "journal+console";
      };
    };

    # Nothing comes in: not even from the tenant's own network.
    networking.nftables = {
      enable = true;
      tables.mvm_builder = {
        family = "inet";
        content = ''
          chain input {
            type filter hook input priority filter; policy drop;
            ct state established,related accept
            iifname "lo" accept
            ip protocol icmp accept
          }
        '';
      };
    };
  };
}
