# The image: what mvm copies out of the Nix store and boots.
#
#   $out/vmlinux    the kernel, uncompressed: an ELF on x86-64 (Firecracker wants that, and QEMU enters it by PVH), an
#                   `Image` on arm64
#   $out/initrd     systemd, and the modules from the transport to the root file system
#   $out/rootfs     squashfs or erofs: the store paths of the system, nothing else
#   $out/vmm.json   {"version":1,"kernel_args":[…],"min_mem_mib":256,"root_format":"squashfs"}
#
# In the guest `/` is in memory and empty at each boot, and the rootfs, the first drive, is `/nix/store`: nothing can be
# written into the image, and nothing that was written elsewhere outlives a stop, except on `/data`.
{ config, lib, pkgs, ... }:
let
  cfg = config.mvm.image;
  inherit (config.system.build) toplevel initialRamdisk;
  kernel = config.boot.kernelPackages.kernel;
  hostPlatform = pkgs.stdenv.hostPlatform;

  name = lib.concatStringsSep "-" (
    [ "tenant" ]
    ++ lib.optional (config.mvm.role != null) config.mvm.role
    ++ lib.optional (config.mvm.profile != null) config.mvm.profile
  );

  # The driver says where the console is; what the image would say to that is left out.
  kernelArgs = lib.filter (arg: !(lib.hasPrefix "console=" arg)) config.boot.kernelParams ++ [
    "init=${toplevel}/init"
  ];

  vmm = {
    version = 1;
    kernel_args = kernelArgs;
    min_mem_mib = lib.foldl' (sum: share: sum + share) 0 (lib.attrValues config.mvm.memoryMiB);
    root_format = cfg.format;
  };

  closure = pkgs.closureInfo { rootPaths = [ toplevel ] ++ cfg.storePaths; };

  makeRoot = {
    squashfs = ''
      mksquashfs nix-path-registration $(cat ${closure}/store-paths) $out/rootfs \
        -no-hardlinks -keep-as-directory -all-root -no-progress -b 256K \
        -comp zstd -Xcompression-level ${toString cfg.compressionLevel} -processors "$NIX_BUILD_CORES"
    '';
    erofs = ''
      mkdir root
      cp -a nix-path-registration $(cat ${closure}/store-paths) root
      mkfs.erofs -zlz4hc,${toString cfg.compressionLevel} -T1 --all-root \
        -U 6d766d00-726f-6f74-8000-6e69782f7374 $out/rootfs root
    '';
  };

  takeKernel =
    if hostPlatform.isx86_64 then
      ''
        # With its symbols it is many times the size; what the machine loads stays.
        objcopy --strip-debug ${kernel.dev}/vmlinux $out/vmlinux
        # XEN_ELFNOTE_PHYS32_ENTRY is note 18 of the owner Xen.
        if ! readelf --notes $out/vmlinux | grep -q 'type: (0x00000012)'; then
          echo "${name}: the kernel ${kernel.name} has no PVH entry (CONFIG_PVH), and QEMU cannot start it" >&2
          exit 1
        fi
      ''
    else
      ''
        cp ${kernel}/Image $out/vmlinux
      '';
in
{
  options.mvm = {
    image = {
      format = lib.mkOption {
        type = lib.types.enum [
          "squashfs"
          "erofs"
        ];
        default = "squashfs";
        description = "The root's file system: squashfs is smaller, erofs reads faster.";
      };
      compressionLevel = lib.mkOption {
        type = lib.types.ints.between 1 12;
        default = 9;
        description = "How hard the root is compressed: zstd's level for squashfs, lz4hc's for erofs.";
      };
      storePaths = lib.mkOption {
        type = lib.types.listOf lib.types.package;
        default = [ ];
        description = "Store paths that are in the image without the system referring to them.";
      };
      writableStore = lib.mkOption {
        type = lib.types.bool;
        default = false;
        description = "Whether the guest can add to `/nix/store`. What it adds is in memory, and gone when it stops.";
      };
    };
    memoryMiB = lib.mkOption {
      type = lib.types.attrsOf lib.types.ints.unsigned;
      description = ''
        The memory that a guest needs at least, in shares that add up: a module that needs more adds a share. mvm
        refuses pools of this image with less than the sum.
      '';
    };
  };

  config = {
    mvm.memoryMiB.system = lib.mkDefault 256;

    fileSystems = {
      "/" = {
        device = "none";
        fsType = "tmpfs";
        options = [
          "mode=0755"
          "size=50%"
        ];
      };
      ${if cfg.writableStore then "/nix/.image" else "/nix/store"} = {
        # Neither file system has a label that both kinds of initrd would find; the root is always the first drive.
        device = "/dev/vda";
        fsType = cfg.format;
        options = [ "ro" ];
        neededForBoot = true;
        noCheck = true;
      };
    }
    // lib.optionalAttrs cfg.writableStore {
      "/nix/.memory" = {
        device = "none";
        fsType = "tmpfs";
        options = [
          "mode=0755"
          "size=80%"
        ];
        neededForBoot = true;
      };
      "/nix/store" = {
        overlay = {
          lowerdir = [ "/nix/.image" ];
          upperdir = "/nix/.memory/store";
          workdir = "/nix/.memory/work";
        };
        neededForBoot = true;
      };
    };

    boot = {
      loader.grub.enable = false;
      initrd = {
        systemd.enable = lib.mkDefault true;
        # The transport first: Firecracker names its devices on the command line, and nothing announces them. The ports
        # are there before the agent looks for them.
        kernelModules = [
          "virtio_mmio"
          "virtio_blk"
          "virtio_console"
          cfg.format
        ]
        ++ lib.optional cfg.writableStore "overlay";
        # Nothing for the hardware of a desk.
        includeDefaultModules = false;
      };
      # Found by udev; named here so that they are in the image whatever the kernel announces.
      kernelModules = [
        "virtio_net"
        "virtio_rng"
      ];
      kernelParams = [
        "quiet"
        "8250.nr_uarts=1"
      ];
    };

    system.build.mvmImage =
      pkgs.runCommand name
        {
          nativeBuildInputs = [
            pkgs.binutils-unwrapped
            (if cfg.format == "squashfs" then pkgs.squashfsTools else pkgs.erofs-utils)
          ];
          vmm = builtins.toJSON vmm;
          passAsFile = [ "vmm" ];
          passthru = { inherit toplevel vmm; };
        }
        ''
          mkdir $out
          ${takeKernel}
          cp ${initialRamdisk}/${config.system.boot.loader.initrdFile} $out/initrd
          cp ${closure}/registration nix-path-registration
          ${makeRoot.${cfg.format}}
          cp "$vmmPath" $out/vmm.json
        '';
  };
}
