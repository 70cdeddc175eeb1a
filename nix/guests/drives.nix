# Drives, by the label of their file system.
#
#   label         where             mounted by
#   mvm-data      /data             the agent, grown to its device
#   mvm-secrets   /run/secrets      the agent: copied into memory, and wiped before sleep
#   mvm-config    /etc/mvm-config   the agent; taken away before sleep, taken anew after a wake
#   any other     `mvm.drives`      systemd, unless it is absent
#
# None of them holds up the boot. A drive that must be there is the business of the manifest (`requires_…_drive`): mvm
# refuses to start the guest without it.
{ config, lib, ... }:
let
  drives = config.mvm.drives;
  agents = {
    mvm-data = "/data";
    mvm-secrets = "/run/secrets";
    mvm-config = "/etc/mvm-config";
  };
  taken = lib.attrValues agents ++ [
    "/"
    "/nix"
    "/nix/store"
  ];
  owner = label: lib.filter (name: drives.${name}.label == label) (lib.attrNames drives);
in
{
  options.mvm.drives = lib.mkOption {
    default = { };
    description = "Further drives, which systemd mounts when they are there.";
    type = lib.types.attrsOf (
      lib.types.submodule (
        { name, ... }:
        {
          options = {
            label = lib.mkOption {
              type = lib.types.strMatching "[A-Za-z0-9_-]{1,16}";
              default = "mvm-${name}";
              description = "The label of its file system; ext4 has room for 16 characters.";
            };
            mountPoint = lib.mkOption {
              type = lib.types.strMatching "/[A-Za-z0-9_./-]*[A-Za-z0-9_-]";
              default = "/${name}";
              description = "Where it is mounted.";
            };
            fsType = lib.mkOption {
              type = lib.types.enum [
                "ext4"
                "squashfs"
                "erofs"
              ];
              default = "ext4";
              description = "Its file system.";
            };
            readOnly = lib.mkOption {
              type = lib.types.bool;
              default = true;
              description = "Whether it is mounted read-only.";
            };
            timeoutSeconds = lib.mkOption {
              type = lib.types.ints.between 1 600;
              default = 60;
              description = "How long units that need the drive wait for it; the boot waits for none.";
            };
          };
        }
      )
    );
  };

  config = {
    assertions = lib.concatMap (
      name:
      let
        drive = drives.${name};
        others = lib.filter (other: other != name) (owner drive.label);
      in
      [
        {
          assertion = !(agents ? ${drive.label});
          message = "mvm: drive ${name}: the label ${drive.label} is the agent's, which mounts it at ${agents.${drive.label} or ""}";
        }
        {
          assertion = !(lib.elem drive.mountPoint taken);
          message = "mvm: drive ${name}: ${drive.mountPoint} is taken";
        }
        {
          assertion = others == [ ];
          message = "mvm: drive ${name}: the label ${drive.label} is also that of ${toString others}";
        }
        {
          assertion = drive.fsType == "ext4" || drive.readOnly;
          message = "mvm: drive ${name}: a ${drive.fsType} file system cannot be written; set readOnly";
        }
      ]
    ) (lib.attrNames drives);

    # Mounted when the device appears, whenever that is: nothing of the boot asks for it.
    systemd.mounts = map (drive: {
      description = "Drive ${drive.label}";
      what = "/dev/disk/by-label/${drive.label}";
      where = drive.mountPoint;
      type = drive.fsType;
      options = lib.concatStringsSep "," (
        [
          "nosuid"
          "nodev"
        ]
        ++ lib.optional drive.readOnly "ro"
        # Nothing to replay: the host may share the drive read-only.
        ++ lib.optional (drive.readOnly && drive.fsType == "ext4") "noload"
      );
      wantedBy = [ "dev-disk-by\\x2dlabel-${lib.replaceStrings [ "-" ] [ "\\x2d" ] drive.label}.device" ];
      unitConfig.JobTimeoutSec = drive.timeoutSeconds;
    }) (lib.attrValues drives);

    # The agent's mount points, and where it looks for programs: `mvm exec` and workloads find what the image has.
    systemd.tmpfiles.rules = [
      "d /data 0755 root root -"
      "d /etc/mvm-config 0755 root root -"
      "d /usr/local 0755 root root -"
      "L+ /usr/local/bin - - - - /run/current-system/sw/bin"
    ];
  };
}
